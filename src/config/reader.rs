//! One pass over the keys of a section. The code that reads a section is also
//! its documentation: every key is declared once, with its default and a line on
//! what it is for, and `--print-config` prints what was declared.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use crate::config::ConfigError;
use crate::config::given::{Given, Origin, Raw};
use crate::config::setting::Setting;

/// One declared key, as it is printed.
#[derive(Clone, Debug)]
pub struct Declared {
    pub key: &'static str,
    about: &'static str,
    /// The value in use as TOML, or an example when the key is not set.
    shown: String,
    set: bool,
}

/// Reads the keys of one section.
pub struct Reader<'a> {
    given: &'a Given,
    /// Prefix of the section's environment variables.
    prefix: &'a str,
    /// Missing keys take their example: only the declarations are wanted.
    describing: bool,
    declared: Vec<Declared>,
}

/// Reads a section by `build`, refusing what `build` declares no key for.
/// Returns what was built and the keys it declared.
pub fn read<T>(
    given: &Given,
    prefix: &str,
    build: impl Fn(&mut Reader<'_>) -> Result<T, ConfigError>,
) -> Result<(T, Vec<Declared>), ConfigError> {
    let declared = describe(prefix, &build)?;
    for (key, _, origin) in given.iter() {
        if !declared.iter().any(|known| known.key == key) {
            let known: Vec<&str> = declared.iter().map(|known| known.key).collect();
            let (origin, key, known) = (origin.clone(), key.to_owned(), known.join(", "));
            return Err(ConfigError::Unknown { origin, key, known });
        }
    }
    let mut reader = Reader { given, prefix, describing: false, declared: Vec::new() };
    let built = build(&mut reader)?;
    Ok((built, reader.declared))
}

/// The keys that `build` declares, with defaults and examples.
pub fn describe<T>(
    prefix: &str,
    build: impl Fn(&mut Reader<'_>) -> Result<T, ConfigError>,
) -> Result<Vec<Declared>, ConfigError> {
    let nothing = Given::default();
    let mut reader = Reader { given: &nothing, prefix, describing: true, declared: Vec::new() };
    build(&mut reader)?;
    Ok(reader.declared)
}

/// A configuration file that says what every key is for.
pub fn print(title: &str, declared: &[Declared]) -> String {
    let mut text = format!("# {title}\n");
    for Declared { key, about, shown, set } in declared {
        text.push('\n');
        for line in about.lines() {
            let _ = writeln!(text, "# {line}");
        }
        let _ = writeln!(text, "{}{key} = {shown}", if *set { "" } else { "# " });
    }
    text
}

impl Reader<'_> {
    /// A key that has a default.
    pub fn or<T: Setting>(
        &mut self,
        key: &'static str,
        default: T,
        about: &'static str,
    ) -> Result<T, ConfigError> {
        let value = self.look_up(key)?.unwrap_or(default);
        self.declare(key, about, value.to_toml(), true);
        Ok(value)
    }

    /// A number with a default, refused outside `range`.
    pub fn within<T: Setting + PartialOrd>(
        &mut self,
        key: &'static str,
        default: T,
        range: RangeInclusive<T>,
        about: &'static str,
    ) -> Result<T, ConfigError> {
        let value = self.or(key, default, about)?;
        if range.contains(&value) {
            return Ok(value);
        }
        let (low, high) = (range.start().to_toml(), range.end().to_toml());
        Err(self.refuse(key, format!("{} is not within {low} to {high}", value.to_toml())))
    }

    /// A key that is off unless set.
    pub fn optional<T: Setting>(
        &mut self,
        key: &'static str,
        example: &str,
        about: &'static str,
    ) -> Result<Option<T>, ConfigError> {
        let value: Option<T> = self.look_up(key)?;
        let shown = value.as_ref().map_or_else(|| example.to_owned(), Setting::to_toml);
        self.declare(key, about, shown, value.is_some());
        Ok(value)
    }

    /// A key that must be set. The example is text, as of `--set`.
    pub fn required<T: Setting>(
        &mut self,
        key: &'static str,
        example: &str,
        about: &'static str,
    ) -> Result<T, ConfigError> {
        let value = match self.look_up(key)? {
            Some(value) => value,
            None if self.describing => {
                T::from_text(example).map_err(|problem| self.refuse(key, problem))?
            }
            None => {
                let variable = format!("{}{}", self.prefix, key.to_ascii_uppercase());
                return Err(ConfigError::Missing { key, variable });
            }
        };
        self.declare(key, about, value.to_toml(), true);
        Ok(value)
    }

    /// Refuses the value of `key`, naming where it was written.
    pub fn refuse(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        let origin = self.given.get(key).map_or(Origin::Derived, |(_, origin)| origin.clone());
        ConfigError::Value { origin, key: key.to_owned(), problem: problem.into() }
    }

    fn look_up<T: Setting>(&self, key: &str) -> Result<Option<T>, ConfigError> {
        let Some((raw, _)) = self.given.get(key) else { return Ok(None) };
        let value = match raw {
            Raw::Toml(value) => T::from_value(value),
            Raw::Text(text) => T::from_text(text),
        };
        value.map(Some).map_err(|problem| self.refuse(key, problem))
    }

    fn declare(&mut self, key: &'static str, about: &'static str, shown: String, set: bool) {
        self.declared.push(Declared { key, about, shown, set });
    }
}
