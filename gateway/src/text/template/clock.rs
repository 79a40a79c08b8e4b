//! `strftime_now` for chat templates that tell the model today's date, in UTC.
//! Refuses directives that no published template uses.

use std::fmt::Write as _;
use std::time::SystemTime;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `now` as `format` asks, with C's directives.
///
/// # Errors
/// The directive that is not known.
pub fn strftime(format: &str, now: SystemTime) -> Result<String, String> {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut two = |value: u64| {
            // Writing to a String cannot fail.
            let _ = if padded { write!(text, "{value:02}") } else { write!(text, "{value}") };
        };
        match directive {
            Some('d') => two(day),
            Some('m') => two(month),
            Some('y') => two(year % 100),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('Y') => text.push_str(&year.to_string()),
            Some('B') => text.push_str(month_name),
            Some('b') => text.push_str(&month_name[..3]),
            Some('A') => text.push_str(weekday),
            Some('a') => text.push_str(&weekday[..3]),
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('e') => text.push_str(&format!("{day:2}")),
            Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => text.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('%') => text.push('%'),
            other => return Err(format!("strftime_now does not know %{}", other.unwrap_or(' '))),
        }
    }
    Ok(text)
}

/// Year, month and day of a day since 1970-01-01 (Gregorian; Hinnant's
/// `civil_from_days`, for days from the epoch on).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_written_as_python_writes_them() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for (seconds, format, text) in [
            (0, "%d %b %Y %A", "01 Jan 1970 Thursday"),
            (951_782_400, "%F", "2000-02-29"),
            (1_763_914_089, "%Y-%m-%d %H:%M:%S %p", "2025-11-23 16:08:09 PM"),
            (1_763_914_089, "%-I %B %y 100%%", "4 November 25 100%"),
        ] {
            assert_eq!(strftime(format, at(seconds)).unwrap(), text);
        }
        assert!(strftime("%Q", at(0)).unwrap_err().contains("%Q"));
    }
}
