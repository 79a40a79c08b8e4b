//! When a certificate begins and ends to be valid. The TLS library checks that
//! and does not tell, but operators want to know how much is left. Only this is
//! read here, from certificates that the library has accepted.

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The explicit tag of a certificate's version.
const VERSION: u8 = 0xa0;

/// Seconds since 1970, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: i64,
    pub not_after: i64,
}

impl Validity {
    /// Reads the dates of a certificate in DER; `None` if it is not one.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (mut certificate, _) = expect(certificate, SEQUENCE)?;
        let (mut fields, _) = expect(certificate, SEQUENCE)?;
        if let Some((_, rest)) = expect(fields, VERSION) {
            fields = rest;
        }
        let (_serial, rest) = expect(fields, INTEGER)?;
        let (_algorithm, rest) = expect(rest, SEQUENCE)?;
        let (_issuer, rest) = expect(rest, SEQUENCE)?;
        (certificate, _) = expect(rest, SEQUENCE)?;
        let (not_before, rest) = time(certificate)?;
        let (not_after, _) = time(rest)?;
        Some(Self { not_before, not_after })
    }
}

/// The content of the element at the beginning, which must have this tag, and
/// what follows it.
fn expect(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = element(bytes)?;
    (found == tag).then_some((content, rest))
}

fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, bytes) = bytes.split_first()?;
    let (&first, mut bytes) = bytes.split_first()?;
    let length = match first {
        0..=0x7f => usize::from(first),
        // Four bytes of length are more than a certificate has.
        0x81..=0x84 => {
            let (digits, rest) = bytes.split_at_checked(usize::from(first - 0x80))?;
            bytes = rest;
            digits.iter().fold(0, |sum, &digit| sum << 8 | usize::from(digit))
        }
        _ => return None,
    };
    let (content, rest) = bytes.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ` (RFC 5280, section 4.1.2.5).
fn time(bytes: &[u8]) -> Option<(i64, &[u8])> {
    let (tag, text, rest) = element(bytes)?;
    let digits = text.strip_suffix(b"Z")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |digits: &[u8]| digits.iter().fold(0, |n, d| n * 10 + i64::from(d - b'0'));
    let (year, digits) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let year = number(&digits[..2]);
            (if year < 50 { 2000 + year } else { 1900 + year }, &digits[2..])
        }
        (GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return None,
    };
    let part = |index: usize| number(&digits[2 * index..2 * index + 2]);
    let (month, day) = (part(0), part(1));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let days = days_from_civil(year, month, day);
    Some((((days * 24 + part(2)) * 60 + part(3)) * 60 + part(4), rest))
}

/// Days since 1970 of a date, by Howard Hinnant's algorithm: years begin in March.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn certificate(from: (i32, u8, u8), to: (i32, u8, u8)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["x".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(from.0, from.1, from.2);
        params.not_after = rcgen::date_time_ymd(to.0, to.1, to.2);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn dates_are_read_in_both_forms() {
        // 2050 and later are written with four digits of the year.
        for (from, to) in [
            ((1975, 1, 1), (4096, 1, 1)),
            ((2024, 2, 29), (2049, 12, 31)),
            ((2026, 3, 1), (2026, 3, 2)),
        ] {
            let (begin, end) = (
                rcgen::date_time_ymd(from.0, from.1, from.2).unix_timestamp(),
                rcgen::date_time_ymd(to.0, to.1, to.2).unix_timestamp(),
            );
            let read = Validity::of(&certificate(from, to));
            assert_eq!(read, Some(Validity { not_before: begin, not_after: end }));
        }
    }

    #[test]
    fn a_cut_certificate_is_none() {
        let whole = certificate((2020, 1, 1), (2030, 1, 1));
        for length in 0..whole.len() {
            assert_eq!(Validity::of(&whole[..length]), None);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_no_reason_to_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Validity::of(&bytes);
        }

        #[test]
        fn any_change_is_no_reason_to_panic(at in 0usize..200, byte: u8) {
            let mut bytes = certificate((2020, 1, 1), (2030, 1, 1));
            bytes[at] = byte;
            let _ = Validity::of(&bytes);
        }

        #[test]
        fn any_time_is_no_reason_to_panic(tag: u8, text in "[0-9Z]{0,16}") {
            let mut bytes = vec![tag, text.len() as u8];
            bytes.extend(text.as_bytes());
            let _ = time(&bytes);
        }
    }
}
