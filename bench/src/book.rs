//! The page of the book: tables between marks are replaced by what was measured.

use std::fs;

use crate::{Result, report::Report};

const PAGE: &str = "docs/src/explanation/sched-bench.md";

/// Puts an experiment's table between `<!-- NAME -->` and `<!-- /NAME -->`.
pub(crate) fn fill(name: &str, report: &Report<'_>) -> Result<()> {
    let page = fs::read_to_string(PAGE)?;
    let filled = replace(&page, name, &report.markdown())
        .ok_or_else(|| format!("{PAGE} has no place for {name}"))?;
    fs::write(PAGE, filled)?;
    Ok(())
}

fn replace(page: &str, name: &str, text: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{text}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::replace;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "a\n<!-- b3 -->\nold\n<!-- /b3 -->\nz\n";
        let once = replace(page, "b3", "new").unwrap();
        assert_eq!(once, "a\n<!-- b3 -->\n\nnew\n<!-- /b3 -->\nz\n");
        assert_eq!(replace(&once, "b3", "new").unwrap(), once);
        assert_eq!(replace(page, "b4", "new"), None);
    }
}
