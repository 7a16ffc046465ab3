//! Images that guests get as disks or as persistent memory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A file of 8 MiB that is not all the same, gone at the end of its test.
pub struct Image(PathBuf);

impl Image {
    /// One for the test `name`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let name = format!("rota-{name}-{}", std::process::id());
        let image = Self(std::env::temp_dir().join(name));
        let bytes: Vec<u8> = (0..8u32 << 20).map(|at| (at ^ at >> 9) as u8).collect();
        fs::write(&image.0, bytes).expect("an image");
        image
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Its SHA-256, as `sha256sum` prints it.
    ///
    /// # Panics
    /// When there is no such program.
    #[must_use]
    pub fn checksum(&self) -> String {
        let output = Command::new("sha256sum").arg(&self.0).output();
        let line = String::from_utf8(output.expect("sha256sum").stdout).expect("text");
        line.split_whitespace().next().expect("a sum").to_owned()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
