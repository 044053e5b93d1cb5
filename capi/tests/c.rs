//! C programs, compiled and linked against both libraries, call everything.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder in which Cargo has put the libraries: beside this test.
fn libraries() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    test.parent().expect("it is in a folder").to_owned()
}

fn compile_and_run(source: &str, library: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().expect("a folder for the program");
    let program = folder.path().join("program");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror"])
        .arg("-I")
        .arg(root.join("include"))
        .arg(root.join("tests").join(source))
        .arg(library)
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&program)
        .output()
        .expect("a C compiler, `cc`, is installed");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&program)
        .env("LD_LIBRARY_PATH", libraries())
        .output()
        .expect("the program was just made");
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{}: {stderr}", run.status);
    assert_eq!(run.stdout, b"all passed\n");
}

#[test]
fn the_header_is_plain_c89() {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/atkd.h");
    let compiled = Command::new("cc")
        .args(["-std=c89", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"])
        .args(["-x", "c"])
        .arg(include)
        .output()
        .expect("a C compiler, `cc`, is installed");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

#[test]
fn c_with_the_shared_library() {
    let name = format!("{}atkd_c{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    for source in ["call.c", "fork.c"] {
        compile_and_run(source, &libraries().join(&name));
    }
}

#[test]
fn c_with_the_static_library() {
    compile_and_run("call.c", &libraries().join("libatkd_c.a"));
}
