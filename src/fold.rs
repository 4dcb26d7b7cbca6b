//! Folding events into state.
