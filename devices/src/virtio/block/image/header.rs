//! What a qcow2 header says about whether the image can be used safely.
//!
//! The format itself is the business of the crate `imago`. This looks at the header before, because that crate reads some
//! images as if they were others (encrypted ones), and to say in one line what is wrong.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::virtio::block::backend::Access;

/// The first bytes of an image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of a header of version 2, and of the part of version 3 that is always there.
const LENGTHS: [usize; 2] = [72, 104];

/// Incompatible features, from bit 0 on, and what an image that has one is.
const INCOMPATIBLE: [&str; 5] = [
    "was not closed properly: repair it with `qemu-img check -r all`",
    "is marked corrupt: repair it with `qemu-img check -r all`",
    "has its data in another file, which Rota does not open",
    "is compressed with something other than zlib",
    "has subclusters (extended_l2=on), which Rota cannot read",
];

/// Says what speaks against using the qcow2 image in `file`, as a predicate; `None` if nothing does.
pub(super) fn objection(file: &File, access: Access) -> io::Result<Option<String>> {
    let mut header = [0; LENGTHS[1]];
    let mut length = 0;
    while length < header.len() {
        match file.read_at(&mut header[length..], length as u64)? {
            0 => break,
            more => length += more,
        }
    }
    Ok(judge(&header[..length], access))
}

fn judge(header: &[u8], access: Access) -> Option<String> {
    let word = |offset: usize| {
        header.get(offset..offset + 4).map_or(0, |bytes| {
            u32::from_be_bytes(bytes.try_into().unwrap_or_default())
        })
    };
    let version = word(4);
    if header.len() < LENGTHS[0] || header[..4] != MAGIC {
        return Some("is no qcow2 image".to_owned());
    }
    if !matches!(version, 2 | 3) {
        return Some(format!(
            "is of qcow2 version {version}, of which Rota knows nothing"
        ));
    }
    if word(32) != 0 {
        return Some("is encrypted, which Rota cannot read".to_owned());
    }
    if word(60) != 0 && access == Access::ReadWrite {
        return Some(
            "has internal snapshots, which writes could damage: open it readonly=on, or delete them"
                .to_owned(),
        );
    }
    if version == 2 {
        return None;
    }
    if header.len() < LENGTHS[1] {
        return Some("is no qcow2 image".to_owned());
    }
    let features = u64::from(word(72)) << 32 | u64::from(word(76));
    if features == 0 {
        return None;
    }
    let bit = features.trailing_zeros() as usize;
    Some(INCOMPATIBLE.get(bit).map_or_else(
        || format!("has a feature (bit {bit}) that Rota does not know"),
        |&what| what.to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u8, changes: &[(usize, u8)]) -> Vec<u8> {
        let mut bytes = vec![0; LENGTHS[1]];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = version;
        for (offset, byte) in changes {
            bytes[*offset] = *byte;
        }
        bytes
    }

    #[test]
    fn an_ordinary_image_is_fine() {
        assert_eq!(judge(&header(2, &[]), Access::ReadWrite), None);
        assert_eq!(judge(&header(3, &[]), Access::ReadWrite), None);
        // Version 2 ends where version 3 has its features.
        assert_eq!(judge(&header(2, &[(79, 1)]), Access::ReadWrite), None);
        assert_eq!(judge(&header(2, &[])[..72], Access::ReadWrite), None);
    }

    #[test]
    fn what_cannot_be_done_safely_is_refused() {
        let refused = |header: &[u8]| judge(header, Access::ReadWrite).expect("an objection");
        assert!(refused(&header(4, &[])).contains("version 4"));
        assert!(refused(&header(3, &[(35, 2)])).contains("encrypted"));
        assert!(refused(&header(2, &[(35, 1)])).contains("encrypted"));
        assert!(refused(&header(3, &[(63, 1)])).contains("snapshots"));
        assert!(refused(&header(3, &[(79, 1)])).contains("not closed"));
        assert!(refused(&header(3, &[(79, 2)])).contains("corrupt"));
        assert!(refused(&header(3, &[(79, 4)])).contains("another file"));
        assert!(refused(&header(3, &[(79, 8)])).contains("compressed"));
        assert!(refused(&header(3, &[(79, 16)])).contains("subclusters"));
        assert!(refused(&header(3, &[(72, 0x80)])).contains("bit 63"));
        for length in [0, 4, 71] {
            assert!(refused(&header(2, &[])[..length]).contains("no qcow2"));
        }
        assert!(refused(&header(3, &[])[..103]).contains("no qcow2"));
    }

    #[test]
    fn snapshots_do_not_matter_to_a_reader() {
        assert_eq!(judge(&header(3, &[(63, 1)]), Access::ReadOnly), None);
    }
}
