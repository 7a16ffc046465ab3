//! The page of the book and the README: tables between marks are replaced by what was measured.

use std::{fs, path::Path};

use crate::{Result, report::Report};

const PAGE: &str = "docs/src/explanation/sched-bench.md";
const README: &str = "README.md";

/// Puts an experiment's plot and table between `<!-- NAME -->` and `<!-- /NAME -->` of `page`; without one, of the book's page, and its headline,
/// if it has one, between the same marks of the README.
pub(crate) fn fill(page: Option<&Path>, name: &str, report: &Report<'_>) -> Result<()> {
    // The other page is that of the lab.
    let plots = if page.is_some() { "sched-lab" } else { "sched" };
    let plot = format!("![{}](../images/{plots}/{name}.svg)", name.to_uppercase());
    let text = format!("{plot}\n\n{}", report.markdown());
    put(page.unwrap_or(Path::new(PAGE)), name, &text)?;
    match report.headline() {
        Some(headline) if page.is_none() => put(Path::new(README), name, &headline),
        _ => Ok(()),
    }
}

fn put(file: &Path, name: &str, text: &str) -> Result<()> {
    let page = fs::read_to_string(file)?;
    let filled = replace(&page, name, text)
        .ok_or_else(|| format!("{} has no place for {name}", file.display()))?;
    fs::write(file, filled)?;
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
    use super::{PAGE, README, replace};

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "a\n<!-- b3 -->\nold\n<!-- /b3 -->\nz\n";
        let once = replace(page, "b3", "new").unwrap();
        assert_eq!(once, "a\n<!-- b3 -->\n\nnew\n<!-- /b3 -->\nz\n");
        assert_eq!(replace(&once, "b3", "new").unwrap(), once);
        assert_eq!(replace(page, "b4", "new"), None);
    }

    #[test]
    fn pages_have_a_place_for_every_table() {
        let read = |file: &str| std::fs::read_to_string(format!("../{file}")).unwrap();
        let lab = "docs/src/explanation/sched-bench-lab.md";
        for page in [PAGE, lab].map(read) {
            for number in (1..=11).chain([13]) {
                let name = format!("b{number}");
                assert!(replace(&page, &name, "").is_some(), "{name}");
            }
        }
        assert!(replace(&read(README), "b7", "").is_some());
    }
}
