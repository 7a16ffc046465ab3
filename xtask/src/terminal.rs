//! Colours, where they are wanted.

use std::io::IsTerminal;

/// Whether standard output may be coloured: a terminal, and no `NO_COLOR` (<https://no-color.org>).
pub(crate) fn colours() -> bool {
    std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A way to show text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style(&'static str);

impl Style {
    pub(crate) const CYAN: Style = Style("36");
    pub(crate) const MAGENTA: Style = Style("35");
    pub(crate) const BOLD: Style = Style("1");
    pub(crate) const RED: Style = Style("31");
    pub(crate) const GREEN: Style = Style("32");

    /// `text` in this style, if `coloured`.
    pub(crate) fn show(self, text: &str, coloured: bool) -> String {
        if coloured {
            format!("\x1b[{}m{text}\x1b[0m", self.0)
        } else {
            text.to_owned()
        }
    }
}
