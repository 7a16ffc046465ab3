//! Whether text may be coloured.

use std::{env, ffi::OsString, io::IsTerminal};

/// Whether a person with a terminal that has colours reads `stream`, and has not said no to them: <https://no-color.org>.
pub(crate) fn wanted(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && allowed(|name| env::var_os(name))
}

/// What the environment says.
fn allowed(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let refused = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = variable("TERM").is_none_or(|term| term == "dumb");
    !refused && !dumb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_can_refuse() {
        let with = |no_color: Option<&str>, term: Option<&str>| {
            allowed(|name| {
                let value = match name {
                    "NO_COLOR" => no_color,
                    "TERM" => term,
                    _ => None,
                };
                value.map(OsString::from)
            })
        };
        assert!(with(None, Some("xterm")));
        assert!(with(Some(""), Some("xterm")));
        assert!(!with(Some("1"), Some("xterm")));
        assert!(!with(None, Some("dumb")));
        assert!(!with(None, None));
    }

    #[test]
    fn a_file_gets_none() {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(!wanted(&file));
    }
}
