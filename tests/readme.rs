//! The README's table of settings is that of config.rs.

use flashcomm::config::SETTINGS;

#[test]
fn the_readme_lists_every_setting_as_config_has_it() {
    let readme = include_str!("../README.md");
    for setting in SETTINGS {
        let row = format!("| `{}` | {} | {} | {} |", setting.name, setting.default, setting.allowed, setting.effect);
        assert!(readme.contains(&row), "the README lacks: {row}");
    }
    let rows = readme.lines().filter(|line| line.starts_with("| `FLASHCOMM_")).count();
    assert_eq!(rows, SETTINGS.len(), "the README has a setting that config.rs lacks");
}
