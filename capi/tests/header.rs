//! include/atkd.h is what cbindgen makes of src.
//!
//! `ATKD_BLESS=1 cargo test -p atkd-capi --test header` writes it anew.

use std::path::Path;

#[test]
fn header_is_generated_from_the_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("it is valid");
    let mut generated = Vec::new();
    ["status.rs", "settings.rs", "types.rs", "lib.rs"]
        .iter()
        .fold(cbindgen::Builder::new().with_config(config), |builder, file| {
            builder.with_src(root.join("src").join(file))
        })
        .generate()
        .expect("the source is what C can express")
        .write(&mut generated);
    // Comments that C has had from the start.
    let generated = String::from_utf8(generated)
        .expect("cbindgen writes UTF-8")
        .replace("// __cplusplus", "/* __cplusplus */")
        .replace("// extern \"C\"", "/* extern \"C\" */");
    let path = root.join("include/atkd.h");
    if std::env::var_os("ATKD_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("include is writable");
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        present == generated,
        "include/atkd.h is not what src says; run ATKD_BLESS=1 cargo test -p atkd-capi --test header"
    );
}
