//! The settings of a struct without a list of them.

use std::collections::BTreeMap;
use std::fmt::Debug;

/// The fields of a struct and their values, as `{:#?}` prints them: by this the bindings' tests find the settings of an
/// [`Objective`](crate::Objective) that an option of theirs changes.
pub fn fields(of: &impl Debug) -> BTreeMap<String, String> {
    let mut fields = Vec::<(String, String)>::new();
    for line in format!("{of:#?}").lines() {
        match line.strip_prefix("    ").and_then(|line| line.split_once(": ")) {
            Some((name, value)) if !name.starts_with(' ') => {
                fields.push((name.into(), value.into()));
            }
            _ => {
                if let Some((_, value)) = fields.last_mut() {
                    *value += line;
                }
            }
        }
    }
    fields.into_iter().collect()
}
