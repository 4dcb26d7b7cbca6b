//! Exact decimals, as Postgres' numeric adds and compares them.
//!
//! jsonb writes a number without exponent and without superfluous zeros in
//! front, and keeps the zeros at its end: that text is the number's form here
//! too. Up to 18 digits are counted in an integer, more are kept as text.

use std::cmp::Ordering;
use std::fmt;

/// The most digits numeric allows before the point.
const MAX_INTEGER_DIGITS: usize = 131_072;

/// The most digits [`Decimal::Small`] holds, those after the point included.
const SMALL_DIGITS: usize = 18;

/// A decimal number that remembers how many digits it shows after the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decimal {
    /// `digits` × 10^-`scale`.
    Small {
        /// All digits, the point left out.
        digits: i64,
        /// How many of them stand after the point.
        scale: u8,
    },
    /// The text of a number with more digits.
    Large(Box<str>),
}

/// The sum has more digits before the point than numeric can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

impl Decimal {
    /// Reads a number as jsonb writes it; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let unsigned = text.strip_prefix('-').unwrap_or(text);
        let (integer, fraction) = match unsigned.split_once('.') {
            Some((integer, fraction)) if !fraction.is_empty() => (integer, fraction),
            Some(_) => return None,
            None => (unsigned, ""),
        };
        let is_plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let leads_with_zero = integer.len() > 1 && integer.starts_with('0');
        if integer.is_empty() || leads_with_zero || !is_plain(integer) || !is_plain(fraction) {
            return None;
        }

        if integer.len() + fraction.len() > SMALL_DIGITS {
            return Some(Self::Large(text.into()));
        }
        let mut digits = 0;
        for byte in integer.bytes().chain(fraction.bytes()) {
            digits = digits * 10 + i64::from(byte - b'0');
        }
        Some(Self::Small {
            digits: if text.starts_with('-') {
                -digits
            } else {
                digits
            },
            scale: fraction.len() as u8,
        })
    }

    /// The sum, showing as many digits after the point as the longer of the two.
    ///
    /// # Errors
    ///
    /// [`Overflow`] if numeric could not hold it.
    pub fn add(&self, other: &Self) -> Result<Self, Overflow> {
        if let Some((left, right, scale)) = Self::aligned(self, other) {
            let sum = left + right;
            if sum.unsigned_abs() < 10u128.pow(SMALL_DIGITS as u32) {
                return Ok(Self::Small {
                    digits: sum as i64,
                    scale,
                });
            }
        }
        add_texts(&self.to_string(), &other.to_string())
    }

    /// Both as whole numbers of the same scale, unless one is large.
    fn aligned(left: &Self, right: &Self) -> Option<(i128, i128, u8)> {
        let (
            Self::Small {
                digits: a,
                scale: s,
            },
            Self::Small {
                digits: b,
                scale: t,
            },
        ) = (left, right)
        else {
            return None;
        };
        // 18 digits moved by at most 18 places have room in 38.
        let raise = |digits: &i64, by: u8| i128::from(*digits) * 10i128.pow(u32::from(by));
        let scale = *s.max(t);
        Some((raise(a, scale - s), raise(b, scale - t), scale))
    }
}

impl From<i64> for Decimal {
    fn from(number: i64) -> Self {
        if number.unsigned_abs() < 10u64.pow(SMALL_DIGITS as u32) {
            Self::Small {
                digits: number,
                scale: 0,
            }
        } else {
            Self::Large(number.to_string().into())
        }
    }
}

impl Ord for Decimal {
    fn cmp(&self, other: &Self) -> Ordering {
        if let Some((left, right, _)) = Self::aligned(self, other) {
            return left.cmp(&right);
        }
        let (left, right) = (self.to_string(), other.to_string());
        let (left, right) = (Digits::of(&left), Digits::of(&right));
        match (left.negative, right.negative) {
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => left.cmp_magnitude(&right),
            (true, true) => right.cmp_magnitude(&left),
        }
    }
}

/// By value: 1.0 and 1.00 compare as equal, and differ for `==`.
impl PartialOrd for Decimal {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Large(text) => f.write_str(text),
            Self::Small { digits, scale: 0 } => write!(f, "{digits}"),
            Self::Small { digits, scale } => {
                let unit = 10u64.pow(u32::from(*scale));
                let magnitude = digits.unsigned_abs();
                let sign = if *digits < 0 { "-" } else { "" };
                let (whole, rest) = (magnitude / unit, magnitude % unit);
                write!(
                    f,
                    "{sign}{whole}.{rest:0width$}",
                    width = usize::from(*scale)
                )
            }
        }
    }
}

/// A number's text, taken apart.
struct Digits<'a> {
    negative: bool,
    integer: &'a [u8],
    fraction: &'a [u8],
}

impl<'a> Digits<'a> {
    fn of(text: &'a str) -> Self {
        let unsigned = text.strip_prefix('-').unwrap_or(text);
        let (integer, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
        let integer = integer.trim_start_matches('0').as_bytes();
        Self {
            negative: text.starts_with('-'),
            integer,
            fraction: fraction.as_bytes(),
        }
    }

    fn cmp_magnitude(&self, other: &Self) -> Ordering {
        let trim = |fraction: &'a [u8]| {
            let end = fraction
                .iter()
                .rposition(|digit| *digit != b'0')
                .map_or(0, |at| at + 1);
            &fraction[..end]
        };
        self.integer
            .len()
            .cmp(&other.integer.len())
            .then_with(|| self.integer.cmp(other.integer))
            .then_with(|| trim(self.fraction).cmp(trim(other.fraction)))
    }

    /// The digits, lowest first, with `scale` of them after the point.
    fn lowest_first(&self, scale: usize) -> impl Iterator<Item = u8> {
        std::iter::repeat_n(b'0', scale - self.fraction.len())
            .chain(self.fraction.iter().rev().copied())
            .chain(self.integer.iter().rev().copied())
            .map(|digit| digit - b'0')
    }
}

/// Adds digit by digit, as on paper.
fn add_texts(left: &str, right: &str) -> Result<Decimal, Overflow> {
    let (left, right) = (Digits::of(left), Digits::of(right));
    let scale = left.fraction.len().max(right.fraction.len());
    let (larger, smaller) = match left.cmp_magnitude(&right) {
        Ordering::Less => (right, left),
        _ => (left, right),
    };

    let same_sign = larger.negative == smaller.negative;
    let mut digits = Vec::with_capacity(scale + larger.integer.len() + 1);
    let mut carry = 0i8;
    let mut small = smaller.lowest_first(scale);
    for large in larger.lowest_first(scale) {
        let other = small.next().unwrap_or(0) as i8;
        let sum = large as i8 + carry + if same_sign { other } else { -other };
        carry = sum.div_euclid(10);
        digits.push(sum.rem_euclid(10) as u8);
    }
    if carry > 0 {
        digits.push(carry as u8);
    }

    // One digit stays before the point, even if it is a zero.
    while digits.len() > scale + 1 && digits.last() == Some(&0) {
        digits.pop();
    }
    while digits.len() < scale + 1 {
        digits.push(0);
    }
    if digits.len() - scale > MAX_INTEGER_DIGITS {
        return Err(Overflow);
    }

    let mut text = String::with_capacity(digits.len() + 2);
    if larger.negative && digits.iter().any(|digit| *digit != 0) {
        text.push('-');
    }
    for (left, digit) in digits.iter().enumerate().rev() {
        text.push(char::from(b'0' + digit));
        if left == scale && scale > 0 {
            text.push('.');
        }
    }
    Ok(Decimal::parse(&text).unwrap_or(Decimal::Large(text.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(left: &str, right: &str) -> String {
        let read = |text| Decimal::parse(text).expect("a number");
        read(left)
            .add(&read(right))
            .expect("no overflow")
            .to_string()
    }

    #[test]
    fn a_sum_shows_the_longer_scale() {
        assert_eq!(sum("1.10", "1"), "2.10");
        assert_eq!(sum("0.1", "0.2"), "0.3");
        assert_eq!(sum("-0.05", "0.05"), "0.00");
        assert_eq!(sum("-1.5", "0.25"), "-1.25");
        assert_eq!(sum("5", "-7"), "-2");
        assert_eq!(sum("0.1", "-0.35"), "-0.25");
    }

    #[test]
    fn many_digits_are_exact() {
        assert_eq!(sum("999999999999999999", "1"), "1000000000000000000");
        assert_eq!(sum("1000000000000000000", "-1"), "999999999999999999");
        assert_eq!(
            sum("0.1234567890123456789012345", "99999999999999999999.5"),
            "99999999999999999999.6234567890123456789012345"
        );
        assert_eq!(
            sum("99999999999999999999.9", "0.1"),
            "100000000000000000000.0"
        );
        assert_eq!(
            sum("-100000000000000000000.00", "100000000000000000000"),
            "0.00"
        );
        assert_eq!(
            sum("100000000000000000000", "-0.0001"),
            "99999999999999999999.9999"
        );
        assert_eq!(
            sum("0.00000000000000000001", "-0.00000000000000000002"),
            "-0.00000000000000000001"
        );
    }

    #[test]
    fn numbers_beyond_numeric_overflow() {
        let nines = Decimal::parse(&"9".repeat(MAX_INTEGER_DIGITS)).expect("a number");
        let one = Decimal::Small {
            digits: 1,
            scale: 0,
        };
        assert_eq!(nines.add(&one), Err(Overflow));
        assert!(
            nines
                .add(&Decimal::Small {
                    digits: -1,
                    scale: 0
                })
                .is_ok()
        );
    }

    #[test]
    fn order_is_by_value() {
        let order = |left, right| Decimal::parse(left).cmp(&Decimal::parse(right));
        assert_eq!(order("1.0", "1.00"), Ordering::Equal);
        assert_eq!(order("-2", "-1.5"), Ordering::Less);
        assert_eq!(order("100000000000000000000", "99.9"), Ordering::Greater);
        assert_eq!(order("-100000000000000000000", "99.9"), Ordering::Less);
        assert_eq!(order("0.10000000000000000000", "0.1"), Ordering::Equal);
        assert_eq!(
            order("0.0000000000000000000", "-0.00000000000000000001"),
            Ordering::Greater
        );
    }

    #[test]
    fn only_plain_numbers_are_read() {
        for text in [
            "", "-", "01", "1.", ".5", "1e5", "+1", "1_0", "--1", "1.2.3", "NaN",
        ] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
        for text in [
            "0",
            "-1",
            "0.00",
            "123456789012345678",
            "-1234567890123456789.10",
        ] {
            assert_eq!(Decimal::parse(text).expect("a number").to_string(), text);
        }
    }
}
