//! The clock of templates.

use minijinja::Error;

use super::limits::refuse;

/// `strftime` in UTC and English, with the directives that chat templates use. `seconds`: Unix time.
pub(super) fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
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
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    // From 0: Sunday.
    let weekday = (days + 4) % 7;
    let day_of_year = 1 + days - days_before(year);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let no_padding = directive == Some('-');
        if no_padding {
            directive = chars.next();
        }
        let two = |n: u64| if no_padding { n.to_string() } else { format!("{n:02}") };
        let space = |n: u64| if no_padding { n.to_string() } else { format!("{n:2}") };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month as u64),
            Some('d') => two(day),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('e') => space(day),
            Some('k') => space(hour),
            Some('l') => space((hour + 11) % 12 + 1),
            Some('j') => format!("{day_of_year:03}"),
            Some('h') => month_name[..3].to_owned(),
            Some('C') => two(year / 100),
            Some('u') => (1 + (weekday + 6) % 7).to_string(),
            Some('w') => weekday.to_string(),
            Some('U') => two((day_of_year + 6 - weekday) / 7),
            Some('W') => two((day_of_year + 6 - (weekday + 6) % 7) / 7),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('X') => strftime(seconds, "%T")?,
            Some('c') => strftime(seconds, "%a %b %e %T %Y")?,
            // The clock has no time zone, as in transformers.
            Some('z' | 'Z') => String::new(),
            Some('n') => "\n".to_owned(),
            Some('t') => "\t".to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            _ => return refuse(format!("strftime_now: unsupported directive in the format {format:?}")),
        });
    }
    Ok(out)
}

/// Days from 1970-01-01 to the first day of a year.
fn days_before(year: u64) -> u64 {
    (1970..year).map(|year| 365 + u64::from(leap(year))).sum()
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Year, month (from 1) and day (from 1) of the day `day` days after 1970-01-01, in the Gregorian calendar.
fn civil_date(mut day: u64) -> (u64, usize, u64) {
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    lengths[1] += u64::from(leap(year));
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strftime_formats() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let now = 1_709_211_909;
        assert_eq!(strftime(now, "%A %d %B %Y %H:%M:%S %p").unwrap(), "Thursday 29 February 2024 13:05:09 PM");
        assert_eq!(strftime(now, "%a %-d %b %y %I %F %T 100%%").unwrap(), "Thu 29 Feb 24 01 2024-02-29 13:05:09 100%");
        assert_eq!(strftime(0, "%F %a").unwrap(), "1970-01-01 Thu");
        assert_eq!(
            strftime(now, "%e|%k|%l|%j|%u|%w|%U|%W|%R|%D|%h").unwrap(),
            "29|13| 1|060|4|4|08|09|13:05|02/29/24|Feb"
        );
        assert_eq!(strftime(now, "%c|%x|%X|%C").unwrap(), "Thu Feb 29 13:05:09 2024|02/29/24|13:05:09|20");
        assert!(strftime(0, "%Q").is_err());
    }
}
