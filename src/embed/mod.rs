//! What embeddings need that SQL cannot do, or does slowly: cutting a text by UTF-16
//! units, running a table owner's code with no more than that owner's rights, and HTTP.
//! `sql/plain/embed.sql` is the twin; the suite compares them.

pub mod exchange;
#[cfg(feature = "extension")]
mod extern_layer;

/// The part of `content` from one UTF-16 unit up to another, as JavaScript's
/// `slice(start, stop)` does. A pair that a bound would cut is left out.
pub fn slice_utf16(content: &str, start: i64, stop: Option<i64>) -> &str {
    let from_end = |place: i64| {
        if place < 0 {
            (units(content) + place).max(0)
        } else {
            place
        }
    };
    let start = from_end(start);
    let stop = stop.map_or(i64::MAX, from_end);
    let mut unit = 0;
    let mut first = content.len();
    let mut end = content.len();
    for (byte, character) in content.char_indices() {
        let next = unit + character.len_utf16() as i64;
        if unit >= start && first > byte {
            first = byte;
        }
        if next > stop {
            end = byte;
            break;
        }
        unit = next;
    }
    if first < end {
        &content[first..end]
    } else {
        ""
    }
}

/// How many UTF-16 units a text has.
fn units(content: &str) -> i64 {
    content
        .chars()
        .map(|character| character.len_utf16() as i64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::slice_utf16;

    #[test]
    fn it_cuts_as_javascript_does_but_through_no_pair() {
        let owl = "a🦉b🦉";
        for (start, stop, part) in [
            (0, None, "a🦉b🦉"),
            (0, Some(0), ""),
            (0, Some(1), "a"),
            (0, Some(2), "a"),
            (0, Some(3), "a🦉"),
            (1, Some(3), "🦉"),
            (2, Some(4), "b"),
            (2, Some(3), ""),
            (-2, None, "🦉"),
            (-1, None, ""),
            (-3, Some(-2), "b"),
            (-100, Some(100), "a🦉b🦉"),
            (3, Some(1), ""),
            (9, None, ""),
        ] {
            assert_eq!(slice_utf16(owl, start, stop), part, "{start} {stop:?}");
        }
        assert_eq!(slice_utf16("", 0, None), "");
    }
}
