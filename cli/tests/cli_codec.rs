//! `flashcomm codec`, run as users run it.

#[allow(dead_code, reason = "a part is used")]
mod command;

use std::path::Path;
use std::process::Command;

use command::{COMMAND, run};
use half::f16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::Value;

fn codec(dir: &Path, arguments: &[&str]) -> (String, String, i32) {
    run(Command::new(COMMAND).arg("codec").args(arguments).current_dir(dir))
}

/// Bell-like numbers, a hot channel among each 64.
fn tensor(path: &Path, count: usize) {
    let value = |i: usize| (0..4).map(|k| ((i * 31 + k * 7919) as f32 * 0.618).fract() - 0.5).sum::<f32>();
    let bytes: Vec<u8> =
        (0..count).flat_map(|i| f16::from_f32(value(i) * if i % 64 == 9 { 30.0 } else { 1.0 }).to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F16, vec![count / 64, 64], &bytes).unwrap();
    serialize_to_file([("x", view)], None, path).unwrap();
}

#[test]
fn the_table_the_recommendation_and_the_files_agree() {
    let dir = tempfile::tempdir().unwrap();
    tensor(&dir.path().join("x.safetensors"), 64 * 1000);
    let files = ["--json", "out.json", "--plot", "out.svg"];
    let (stdout, stderr, code) = codec(dir.path(), &[&["x.safetensors", "--error", "0.05"], &files[..]].concat());
    assert_eq!((stderr.as_str(), code), ("", 0), "{stdout}");
    assert!(stdout.contains("x.safetensors: x: fp16, cut into 4 inputs of 16000 elements."), "{stdout}");
    let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join("out.json")).unwrap()).unwrap();
    let lines = json["lines"].as_array().unwrap();
    assert_eq!(lines.len(), 1 + 7 * 2, "16 bits, and each width with each code");
    assert_eq!(lines[0]["code"], Value::Null);
    let recommended = &json["recommended"];
    for (name, key) in [("FLASHCOMM_BITS", "bits"), ("FLASHCOMM_CODE", "code")] {
        let setting = format!("  {name}={}\n", recommended[key].as_str().unwrap());
        assert!(stdout.contains(&setting), "{setting}: {stdout}");
    }
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
    for line in &lines[1..] {
        let fits = number(&line["sum"], "worst_relative_l2") <= 0.05;
        assert!(!fits || number(line, "bits_per_element") >= number(recommended, "bits_per_element"), "{line}");
        let cells = [&line["bits"], &line["code"]].map(|cell| cell.as_str().unwrap());
        let row = stdout.lines().find(|row| row.split_whitespace().take(2).eq(cells)).unwrap();
        assert!(row.contains(&format!("{:.5}", number(&line["sum"], "relative_l2"))), "{row}");
    }
    let svg = std::fs::read_to_string(dir.path().join("out.svg")).unwrap();
    assert!(svg.contains("blocks, group 64"));

    let (stdout, _, code) =
        codec(dir.path(), &["x.safetensors", "--bits", "2,3:4", "--codes", "plain,blocks", "--error", "0.001"]);
    assert!(code == 1 && stdout.contains("No code here stays at an error of at most 0.001"), "{stdout}");
    let of_3_4 = stdout.lines().filter(|line| line.trim_start().starts_with("3:4")).count();
    assert_eq!(of_3_4, 1, "there are no kernels of blocks for it: {stdout}");
    let (stdout, _, code) = codec(dir.path(), &["x.safetensors", "--bits", "2"]);
    assert!(code == 0 && stdout.contains("No code here"), "nobody asked: {stdout}");
    let (stdout, ..) = codec(dir.path(), &["x.safetensors", "--bits", "4", "--max-elements", "16K"]);
    assert!(stdout.contains("16000 elements, of which 4096 are measured"), "{stdout}");
}

#[test]
fn what_is_wrong_is_said_with_its_cure() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("x.npy"), "nothing of numpy's").unwrap();
    tensor(&dir.path().join("x.safetensors"), 6400);
    for (arguments, said, expected) in [
        (&["x.npy"][..], "save it again with numpy.save", 1),
        (&["nowhere.safetensors"], "cannot read nowhere.safetensors", 1),
        (&["x.safetensors", "--plot", "x.png"], "x.svg", 1),
        (&["x.safetensors", "--bits", "9"], "2 to 8", 2),
        (&["x.safetensors", "--codes", "magic"], "plain, blocks", 2),
        (&["."], "x.npy", 1),
        (&[], "FILE", 2),
    ] {
        let (stdout, stderr, code) = codec(dir.path(), arguments);
        assert!(code == expected && stderr.contains(said), "{arguments:?}: {code}\n{stdout}{stderr}");
    }
}
