//! The map of the library in src/lib.rs is true, no two of its files need each other, and no file or function is so long
//! that it owes its reader a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files with this ending below a folder, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path, ending)),
            false if path.extension().is_some_and(|extension| extension == ending) => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}

/// A file of the library: the path of its module, and its text without tests and comments.
struct Source {
    module: Vec<String>,
    text: String,
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let library = files(&src, "rs").into_iter().filter(|path| path.file_name().unwrap() != "lib.rs");
    library
        .map(|path| {
            let relative = path.strip_prefix(&src).unwrap().with_extension("");
            let mut module: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_string()).collect();
            module.pop_if(|last| last == "mod");
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            Source { module, text: code.collect::<Vec<_>>().join("\n") }
        })
        .filter(|source| source.module != ["abi", "prototypes"]) // a test
        .collect()
}

/// The paths that `use` statements and expressions name, braces spread out.
fn paths(text: &str) -> BTreeSet<Vec<String>> {
    fn spread(prefix: &[String], rest: &str, found: &mut BTreeSet<Vec<String>>) {
        let rest = rest.trim();
        match rest.find('{') {
            Some(open) if rest.ends_with('}') => {
                let mut prefix = prefix.to_vec();
                prefix
                    .extend(rest[..open].split("::").map(str::trim).filter(|part| !part.is_empty()).map(String::from));
                let (mut depth, mut start) = (0, open + 1);
                let inner = &rest[..rest.len() - 1];
                for (at, letter) in inner.char_indices().skip(open + 1) {
                    match letter {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            spread(&prefix, &inner[start..at], found);
                            start = at + 1;
                        }
                        _ => {}
                    }
                }
                spread(&prefix, &inner[start..], found);
            }
            _ => {
                let path = rest.split(" as ").next().unwrap();
                let parts = path.split("::").map(str::trim).filter(|part| !part.is_empty()).map(String::from);
                found.insert(prefix.iter().cloned().chain(parts).collect());
            }
        }
    }
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("use ") {
        let is_statement = text[..at].lines().last().is_none_or(|before| {
            let before = before.trim();
            before.is_empty() || before.starts_with("pub")
        });
        if let Some(statement) = text[at + 4..].split(';').next().filter(|_| is_statement) {
            spread(&[], statement, &mut found);
        }
    }
    // Of a module within the file.
    found.remove(["super", "*"].map(String::from).as_slice());
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':';
    for start in ["crate::", "super::"] {
        for (at, _) in text.match_indices(start) {
            let path: String = text[at..].chars().take_while(|letter| is_part(*letter)).collect();
            if path == "super::" {
                continue;
            }
            found.insert(path.split("::").filter(|part| !part.is_empty()).map(String::from).collect());
        }
    }
    found
}

/// Which modules each module of the library uses.
fn uses() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let sources = sources();
    let modules: BTreeSet<Vec<String>> = sources.iter().map(|source| source.module.clone()).collect();
    let is_folder =
        |module: &[String]| modules.iter().any(|other| other.len() > module.len() && other.starts_with(module));
    let resolve = |from: &[String], path: &[String]| {
        let (mut base, mut rest) = match path.first().map(String::as_str) {
            Some("crate") => (Vec::new(), &path[1..]),
            Some("super") => (from[..from.len() - 1].to_vec(), &path[1..]),
            _ => (from.to_vec(), path),
        };
        while rest.first().is_some_and(|part| part == "super") {
            base.pop();
            rest = &rest[1..];
        }
        let mut target = base.clone();
        for part in rest {
            target.push(part.clone());
            if !modules.contains(&target) {
                target.pop();
                break;
            }
        }
        let is_relative = !matches!(path.first().map(String::as_str), Some("crate" | "super"));
        let is_named = target.len() > base.len() || !is_relative;
        (is_named && !target.is_empty() && target != from).then_some(target)
    };
    let used = |source: &Source| {
        let paths = paths(&source.text);
        let is_own = |path: &Vec<String>| is_folder(&source.module) || path[0] == "crate" || path[0] == "super";
        paths
            .iter()
            .filter(|path| !path.is_empty() && is_own(path))
            .filter_map(|path| resolve(&source.module, path))
            .collect()
    };
    sources.iter().map(|source| (source.module.clone(), used(source))).collect()
}

/// The rooms of the map in src/lib.rs, by line: those of a line use only those of later ones.
fn map() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let (_, map) = text.split_once("//! # The map").expect("a heading in src/lib.rs");
    let (_, map) = map.split_once("//! ```text\n").expect("a map");
    let (map, _) = map.split_once("//! ```").unwrap();
    let rooms = |line: &str| {
        let line = line.trim_start_matches("//! ");
        let names = line.split("  ").next().unwrap();
        names.split(", ").map(|name| name.trim().to_string()).collect()
    };
    map.lines().map(rooms).collect()
}

#[test]
fn each_room_uses_only_rooms_below_it_on_the_map() {
    let map = map();
    let line_of = |room: &str| map.iter().position(|line| line.iter().any(|name| name == room));
    let uses = uses();
    let rooms: BTreeSet<&str> = uses.keys().map(|module| module[0].as_str()).collect();
    let drawn: BTreeSet<&str> = map.iter().flatten().map(String::as_str).collect();
    assert_eq!(rooms, drawn, "the map has the rooms that there are");
    let mut wrong = Vec::new();
    for (from, targets) in &uses {
        for to in targets.iter().filter(|to| to[0] != from[0]) {
            if line_of(&to[0]) <= line_of(&from[0]) {
                wrong.push(format!("{} uses {}", from.join("::"), to.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "against the map of src/lib.rs: {wrong:#?}");
    // What the check is worth: it sees the arrows that are there.
    for (from, to) in [("abi", "comm"), ("comm", "negotiation"), ("negotiation", "exchange"), ("exchange", "kernels")] {
        assert!(uses.iter().any(|(module, targets)| module[0] == from && targets.iter().any(|target| target[0] == to)));
    }
}

#[test]
fn no_two_files_of_the_library_need_each_other() {
    let mut left = uses();
    // Files that need none of those left go; what stays is circles, and what hangs on them.
    loop {
        let done: Vec<Vec<String>> = left
            .iter()
            .filter(|(_, to)| !to.iter().any(|to| left.contains_key(to)))
            .map(|(from, _)| from.clone())
            .collect();
        if done.is_empty() {
            break;
        }
        done.iter().for_each(|module| _ = left.remove(module));
    }
    let left: Vec<String> = left.keys().map(|module| module.join("::")).collect();
    assert!(left.is_empty(), "in or above a circle: {left:?}");
}

#[test]
fn every_export_runs_in_the_guard_or_is_a_bare_jump() {
    let exports = |text: &str| text.matches("#[unsafe(no_mangle)]").count();
    for path in files(&root().join("src"), "rs") {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap().to_string();
        match name.as_str() {
            // What defines those of NCCL's that are ours: one pattern, whose body is in the guard.
            "abi/boundary.rs" => {
                let (_, export) = text.split_once("#[unsafe(no_mangle)]").unwrap();
                assert!(exports(&text) == 1 && export.contains("boundary::guarded(stringify!($name), || $body)"));
            }
            // The jumps, one pattern for each machine.
            "abi/forward.rs" => assert!(exports(&text) == 2 && text.matches("naked_asm!(").count() == 2),
            "abi/control.rs" | "abi/way.rs" => {
                for export in text.split("#[unsafe(no_mangle)]").skip(1) {
                    let body = export.split("\n}\n").next().unwrap();
                    let guards = ["answer(\"", "guarded(", "guarded_or("];
                    assert!(guards.iter().any(|guard| body.contains(guard)), "not in the guard: {body}");
                }
            }
            _ => assert_eq!(exports(&text), 0, "src/{name} exports something"),
        }
    }
}

/// Where code is, by the ending of its files.
const CODE: [(&str, &str); 13] = [
    ("src", "rs"),
    ("cli", "rs"),
    ("wire", "rs"),
    ("sim", "rs"),
    ("tests", "rs"),
    ("benches", "rs"),
    ("kernels", "cu"),
    ("kernels", "cuh"),
    ("scripts", "sh"),
    ("scripts", "py"),
    ("python", "py"),
    ("tests", "py"),
    ("examples", "cpp"),
];

#[test]
fn a_file_of_more_than_400_lines_says_why_at_its_head() {
    let mut silent = Vec::new();
    for (folder, ending) in CODE {
        for path in files(&root().join(folder), ending) {
            let text = fs::read_to_string(&path).unwrap();
            let n_lines = text.lines().count();
            if n_lines > 400 && !text.lines().take(40).any(|line| line.contains("More than 400 lines:")) {
                silent.push(format!("{}: {n_lines} lines", path.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(silent.is_empty(), "{silent:#?}");
}

#[test]
fn no_function_has_more_than_80_lines() {
    let mut long = Vec::new();
    for (folder, ending) in CODE.into_iter().filter(|(_, ending)| *ending == "rs") {
        for path in files(&root().join(folder), ending) {
            let text = fs::read_to_string(&path).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            for (at, line) in lines.iter().enumerate() {
                let indent = line.len() - line.trim_start().len();
                let is_function = line.trim_start().split("fn ").next().is_some_and(|before| {
                    before.len() < line.trim_start().len()
                        && before.split_whitespace().all(|word| {
                            word.starts_with("pub") || ["const", "unsafe", "extern", "\"C\"", "in"].contains(&word)
                        })
                });
                // rustfmt closes what a line opens at the indentation of that line.
                let is_end = |line: &&&str| line.len() == indent + 1 && line.ends_with('}');
                if let Some(end) = is_function.then(|| lines[at..].iter().position(|line| is_end(&line))).flatten()
                    && end + 1 > 80
                {
                    let path = path.strip_prefix(root()).unwrap().display();
                    long.push(format!("{path}:{}: {} lines: {}", at + 1, end + 1, line.trim()));
                }
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}
