//! src/params.rs is what bindgen makes of kernels/params.h.
//!
//! `ATKD_BLESS=1 cargo test --test bindings` writes it anew.

use std::io::Write;
use std::path::Path;

#[test]
fn params_are_generated_from_the_header() {
    // libclang is bindgen's, and not on every machine: `pip install libclang` brings it.
    if std::env::var_os("LIBCLANG_PATH").is_none() {
        // Not by a macro whose output the test runner swallows.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: params.rs was not compared with params.h, since LIBCLANG_PATH is not set \
             (pip install libclang, then set it to the folder that has libclang.so)"
        );
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let generated = bindgen::Builder::default()
        .header(root.join("kernels/params.h").to_str().expect("a path in UTF-8"))
        .allowlist_item("(?i)atkd_.*")
        .raw_line("// Generated from kernels/params.h by tests/bindings.rs.")
        .raw_line("#![allow(non_camel_case_types, missing_docs, dead_code)]")
        .derive_default(false)
        .generate_comments(false)
        .generate()
        .expect("the header is plain C")
        .to_string();
    let path = root.join("src/params.rs");
    if std::env::var_os("ATKD_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("src is writable");
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        present == generated,
        "src/params.rs is not what kernels/params.h says; run ATKD_BLESS=1 cargo test --test bindings"
    );
}
