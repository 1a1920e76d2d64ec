//! The documentation's table of settings is that of config/table.rs, and what it links to is there.

use std::path::Path;

use flashcomm::tooling::settings::SETTINGS;

#[test]
fn the_documentation_lists_every_setting_as_config_has_it() {
    let tuning = include_str!("../../docs/tuning.md");
    for setting in SETTINGS {
        let row = format!("| `{}` | {} | {} | {} |", setting.name, setting.default, setting.allowed, setting.effect);
        assert!(tuning.contains(&row), "docs/tuning.md lacks: {row}");
    }
    let rows = tuning.lines().filter(|line| line.starts_with("| `FLASHCOMM_")).count();
    assert_eq!(rows, SETTINGS.len(), "docs/tuning.md has a setting that config/table.rs lacks");
}

#[test]
fn every_link_of_the_documentation_leads_to_a_file_and_a_heading() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages: Vec<_> = docs.chain([root.join("README.md"), root.join("CONTRIBUTING.md")]).collect();
    for page in pages.iter().filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
        let text = std::fs::read_to_string(page).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let target = std::fs::read_to_string(&target);
            let target = target.unwrap_or_else(|error| panic!("{}: {link}: {error}", page.display()));
            let anchor = |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            let mut headings = target.lines().filter(|line| line.starts_with('#')).map(anchor);
            assert!(heading.is_empty() || headings.any(|known| known == heading), "{}: {link}", page.display());
        }
    }
}
