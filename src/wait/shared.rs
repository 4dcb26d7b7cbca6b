//! Where the board lies: in the server's shared memory when the library is
//! preloaded; else, from PostgreSQL 17 on, in a segment that is made when it is
//! first wanted; else nowhere, and waiters poll.

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::Relaxed;

use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;
use pgrx::prelude::*;

use super::board::Board;

/// Two versions of the library may meet in one server: a board that is laid out
/// in another way needs another name.
const NAME: &CStr = c"nightowls board 1";

/// Where the board lies, in this process.
static BOARD: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// Asks for shared memory if the server is just starting.
pub fn init() {
    // SAFETY: the postmaster has one thread, and hooks are set while it loads
    // libraries.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: what was there before is called as Postgres would have called it.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            pg_guard_ffi_boundary(|| previous());
        }
        pg_sys::RequestAddinShmemSpace(Board::size(backends()));
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: as above. Only the postmaster comes here, before it has children and
    // again after a crash, so nobody else makes the same struct meanwhile.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            pg_guard_ffi_boundary(|| previous());
        }
        let size = Board::size(backends());
        let mut found = false;
        let start = pg_sys::ShmemInitStruct(NAME.as_ptr(), size, &mut found).cast::<u8>();
        if !found {
            clear(start.cast());
        }
        BOARD.store(start, Relaxed);
    }
}

/// An empty board.
#[pg_guard]
unsafe extern "C-unwind" fn clear(start: *mut c_void) {
    // SAFETY: so many bytes were asked for.
    unsafe { ptr::write_bytes(start.cast::<u8>(), 0, Board::size(backends())) }
}

/// The board, if this server has one.
pub fn board() -> Option<&'static Board> {
    if BOARD.load(Relaxed).is_null() {
        BOARD.store(segment()?, Relaxed);
    }
    known_board()
}

/// The board, if this backend has used it: asks the server for nothing.
pub fn known_board() -> Option<&'static Board> {
    let start = BOARD.load(Relaxed);
    // SAFETY: it lies there for as long as this process lives.
    (!start.is_null()).then(|| unsafe { Board::at(start, backends()) })
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
fn segment() -> Option<*mut u8> {
    let mut found = false;
    // SAFETY: the callback writes no more than the size asked for.
    let start = unsafe {
        pg_sys::GetNamedDSMSegment(
            NAME.as_ptr(),
            Board::size(backends()),
            Some(clear),
            &mut found,
        )
    };
    Some(start.cast())
}

#[cfg(not(any(feature = "pg17", feature = "pg18")))]
fn segment() -> Option<*mut u8> {
    None
}

/// How many backends there can be; known before shared memory is asked for, and
/// the same until the server stops.
fn backends() -> usize {
    // SAFETY: written once, while the server starts.
    unsafe { pg_sys::MaxBackends as usize }
}

/// The number of this backend's bed.
pub fn my_number() -> usize {
    // SAFETY: written once, when the backend starts; both are its own.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    let number = unsafe { pg_sys::MyBackendId - 1 };
    // SAFETY: as above.
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    let number = unsafe { pg_sys::MyProcNumber };
    number as usize
}
