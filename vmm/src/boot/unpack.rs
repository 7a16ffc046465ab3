//! Unpacking a bzImage here instead of in the guest.
//!
//! A bzImage unpacks itself, in a guest that has just been born: every page it writes is a fault in the nested page tables, and
//! the image is moved once more when it is done. Where the payload is LZ4 we unpack it while it is read, each piece to its
//! final place, and enter the kernel where its own decompressor would have. That includes its randomization of kernel
//! addresses (KASLR): the relocations that follow the image are applied for a random offset, unless the command line says
//! `nokaslr`. A payload that is packed in another way, or laid out in a way not known here, is left to the guest.
//!
//! The payload is an ELF image, cut into LZ4 blocks of 8 MiB, and behind it lists of 32-bit addresses to be relocated, each
//! preceded by a zero: 64-bit fields, then (in older kernels) fields to be decreased, then 32-bit fields.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt, thread};

use linux_loader::{
    bootparam::setup_header,
    elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD},
};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory,
    VolatileSlice,
};

use crate::layout::HIGH_RAM_START;

/// What the LZ4 tool's old format, which the kernel's build uses, starts with.
const LZ4_MAGIC: u32 = 0x184c_2102;
const BLOCK: usize = 8 << 20;
/// How many blocks are unpacked at once, each on a thread of its own, while the one before them goes to its place.
const AHEAD: usize = 2;
const DAMAGED: Reason = Reason::Corrupt("damaged LZ4 payload");
/// Where the kernel's addresses start; physical ones are added to it.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// How much of it a randomized kernel may lie in.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// Segments the header may name at most before it is taken for garbage; kernels have about five.
const MAX_SEGMENTS: usize = 32;

/// An unpacked kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unpacked {
    /// Where to enter it.
    pub(super) entry: u64,
    /// Whether its addresses have been randomized.
    pub(super) randomized: bool,
}

/// Why a payload was not unpacked.
#[derive(Debug)]
pub(super) enum Reason {
    /// It is packed or laid out in a way that the guest has to deal with.
    Unfamiliar,
    /// It is damaged.
    Corrupt(&'static str),
    /// It cannot be read.
    Read(io::Error),
}

/// Unpacks the kernel in `file` whose header is `header` and whose protected-mode part starts at `offset`. `random` gives a
/// number to choose the kernel's address by, `None` keeps the address it was linked for.
pub(super) fn unpack(
    memory: &GuestMemoryMmap,
    file: &File,
    header: &setup_header,
    offset: u64,
    random: Option<u64>,
) -> Result<Unpacked, Reason> {
    let mut payload = Payload {
        file,
        position: offset + u64::from(header.payload_offset),
        // The last four bytes are the unpacked size.
        end: (offset + u64::from(header.payload_offset) + u64::from(header.payload_length))
            .saturating_sub(4),
    };
    if payload.end > file.metadata().map_err(Reason::Read)?.len() {
        return Err(Reason::Corrupt("its payload ends behind the file"));
    }
    if payload.word()? != LZ4_MAGIC {
        return Err(Reason::Unfamiliar);
    }
    let mut image: Option<Image> = None;
    thread::scope(|scope| {
        let mut ahead = VecDeque::with_capacity(AHEAD);
        let mut spare: Vec<Block> = Vec::new();
        loop {
            while ahead.len() < AHEAD {
                let mut block = spare.pop().unwrap_or_default();
                if !payload.next_block(&mut block.packed)? {
                    break;
                }
                ahead.push_back(scope.spawn(move || block.unpack()));
            }
            let Some(next) = ahead.pop_front() else {
                return Ok(());
            };
            let block = next.join().unwrap_or(Err(DAMAGED))?;
            let image = match &mut image {
                Some(image) => image,
                none => none.insert(Image::new(memory, header, block.bytes())?),
            };
            image.take(block.bytes())?;
            spare.push(block);
        }
    })?;
    let image = image.ok_or(Reason::Corrupt("empty payload"))?;
    let randomized = random.is_some_and(|random| image.relocate(header, random));
    Ok(Unpacked {
        entry: image.entry,
        randomized,
    })
}

/// A block on its way. Its memory is used for one block after the other.
#[derive(Default)]
struct Block {
    packed: Vec<u8>,
    unpacked: Vec<u8>,
    length: usize,
}

impl Block {
    fn unpack(mut self) -> Result<Self, Reason> {
        if self.unpacked.is_empty() {
            // Pages the kernel zeroes only when they are written.
            self.unpacked = vec![0; BLOCK];
        }
        self.length = lz4_flex::block::decompress_into(&self.packed, &mut self.unpacked)
            .map_err(|_| DAMAGED)?;
        Ok(self)
    }

    fn bytes(&self) -> &[u8] {
        &self.unpacked[..self.length]
    }
}

/// The packed payload, block by block.
struct Payload<'a> {
    file: &'a File,
    position: u64,
    end: u64,
}

impl Payload<'_> {
    fn word(&mut self) -> Result<u32, Reason> {
        let mut bytes = [0; 4];
        self.file
            .read_exact_at(&mut bytes, self.position)
            .map_err(Reason::Read)?;
        self.position += 4;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads the next block; false when there is none.
    fn next_block(&mut self, block: &mut Vec<u8>) -> Result<bool, Reason> {
        if self.position >= self.end {
            return Ok(false);
        }
        let length = u64::from(self.word()?);
        if length > self.end.saturating_sub(self.position) {
            return Err(Reason::Corrupt("LZ4 block longer than the payload"));
        }
        // Bounded by the payload, which lies within the file.
        block.resize(usize::try_from(length).unwrap_or(0), 0);
        self.file
            .read_exact_at(block, self.position)
            .map_err(Reason::Read)?;
        self.position += length;
        Ok(true)
    }
}

/// A stretch of the ELF file and where it goes.
struct Segment {
    from: u64,
    length: u64,
    /// Offset in the kernel's part of guest memory.
    to: u64,
}

/// The ELF image on its way into guest memory.
struct Image<'a> {
    /// Guest memory from the kernel's first to its last byte.
    place: VolatileSlice<'a>,
    entry: u64,
    segments: Vec<Segment>,
    /// Length of the ELF file; relocations follow.
    length: u64,
    taken: u64,
    relocations: Vec<u8>,
}

impl<'a> Image<'a> {
    /// Reads the headers at the start of the image. Kernels are linked for `pref_address` and need `init_size` bytes from there.
    fn new(
        memory: &'a GuestMemoryMmap,
        header: &setup_header,
        start: &[u8],
    ) -> Result<Self, Reason> {
        let mut elf = Elf64_Ehdr::default();
        let elf_header = start
            .get(..size_of::<Elf64_Ehdr>())
            .ok_or(Reason::Unfamiliar)?;
        elf.as_mut_slice().copy_from_slice(elf_header);
        let segments_wanted = usize::from(elf.e_phnum);
        if !elf_header.starts_with(b"\x7fELF\x02\x01")
            || usize::from(elf.e_phentsize) != size_of::<Elf64_Phdr>()
            || segments_wanted > MAX_SEGMENTS
            || header.pref_address < HIGH_RAM_START
        {
            return Err(Reason::Unfamiliar);
        }
        let (base, size) = (header.pref_address, u64::from(header.init_size));
        let mut segments = Vec::new();
        let mut length = elf
            .e_shoff
            .saturating_add(u64::from(elf.e_shnum) * u64::from(elf.e_shentsize));
        for index in 0..segments_wanted {
            let mut segment = Elf64_Phdr::default();
            let at = usize::try_from(elf.e_phoff)
                .unwrap_or(usize::MAX)
                .saturating_add(index * size_of::<Elf64_Phdr>());
            let bytes = start
                .get(at..at.saturating_add(size_of::<Elf64_Phdr>()))
                .ok_or(Reason::Unfamiliar)?;
            segment.as_mut_slice().copy_from_slice(bytes);
            if segment.p_type != PT_LOAD {
                continue;
            }
            let to = segment
                .p_paddr
                .checked_sub(base)
                .ok_or(Reason::Unfamiliar)?;
            if to
                .checked_add(segment.p_filesz)
                .is_none_or(|end| end > size)
            {
                return Err(Reason::Unfamiliar);
            }
            length = length.max(segment.p_offset.saturating_add(segment.p_filesz));
            segments.push(Segment {
                from: segment.p_offset,
                length: segment.p_filesz,
                to,
            });
        }
        let end = base.checked_add(size).ok_or(Reason::Unfamiliar)?;
        if !(base..end).contains(&elf.e_entry) {
            return Err(Reason::Unfamiliar);
        }
        let place = memory
            .get_slice(
                GuestAddress(base),
                usize::try_from(size).unwrap_or(usize::MAX),
            )
            .map_err(|_| Reason::Unfamiliar)?;
        Ok(Self {
            place,
            entry: elf.e_entry,
            segments,
            length,
            taken: 0,
            relocations: Vec::new(),
        })
    }

    /// Takes the next bytes of the unpacked payload.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Reason> {
        let (first, last) = (self.taken, self.taken + bytes.len() as u64);
        for segment in &self.segments {
            let from = segment.from.max(first);
            let end = (segment.from.saturating_add(segment.length)).min(last);
            if from < end {
                let part = &bytes[(from - first) as usize..(end - first) as usize];
                let to = (segment.to + (from - segment.from)) as usize;
                self.place
                    .write_slice(part, to)
                    .map_err(|_| Reason::Unfamiliar)?;
            }
        }
        if last > self.length {
            let start = self.length.saturating_sub(first) as usize;
            if self.relocations.len() + bytes.len() > self.place.len() {
                return Err(Reason::Unfamiliar);
            }
            self.relocations.extend_from_slice(&bytes[start..]);
        }
        self.taken = last;
        Ok(())
    }

    /// Moves the kernel's addresses by an offset chosen by `random`. Returns whether it did: a kernel without (known)
    /// relocations stays as it is.
    fn relocate(&self, header: &setup_header, random: u64) -> bool {
        let Some(lists) = lists(&self.relocations) else {
            return false;
        };
        let alignment = u64::from(header.kernel_alignment).max(1);
        let Some(room) =
            KERNEL_IMAGE_SIZE.checked_sub(header.pref_address + u64::from(header.init_size))
        else {
            return false;
        };
        let delta = random % (room / alignment + 1) * alignment;
        let base = KERNEL_MAP + header.pref_address;
        let offsets = |list: &'_ [u8]| -> Option<Vec<usize>> {
            list.chunks_exact(4)
                .map(|word| {
                    let word = i32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    let offset = i64::from(word).cast_unsigned().checked_sub(base)?;
                    usize::try_from(offset)
                        .ok()
                        .filter(|offset| offset + 8 <= self.place.len())
                })
                .collect()
        };
        // All of them or none: a kernel that is relocated in part is lost.
        let (Some(wide), Some(inverse), Some(narrow)) = (
            offsets(lists.wide),
            offsets(lists.inverse),
            offsets(lists.narrow),
        ) else {
            return false;
        };
        // 32-bit fields hold the low half of an address.
        #[expect(clippy::cast_possible_truncation)]
        let delta_32 = delta as u32;
        for offset in wide {
            self.change(offset, |value: u64| value.wrapping_add(delta));
        }
        for offset in inverse {
            self.change(offset, |value: u32| value.wrapping_sub(delta_32));
        }
        for offset in narrow {
            self.change(offset, |value: u32| value.wrapping_add(delta_32));
        }
        true
    }

    fn change<T: ByteValued>(&self, offset: usize, change: impl Fn(T) -> T) {
        // The offsets have been checked to lie within.
        if let Ok(field) = self.place.get_ref::<T>(offset) {
            field.store(change(field.load()));
        }
    }
}

/// The three lists of addresses to relocate.
#[derive(Debug, PartialEq, Eq)]
struct Lists<'a> {
    wide: &'a [u8],
    inverse: &'a [u8],
    narrow: &'a [u8],
}

/// Takes the table apart; `None` for a table that does not start with a zero or has other than two or three lists.
fn lists(table: &[u8]) -> Option<Lists<'_>> {
    if !table.len().is_multiple_of(4) {
        return None;
    }
    let zeros: Vec<usize> = table
        .chunks_exact(4)
        .enumerate()
        .filter(|(_, word)| *word == [0; 4])
        .map(|(index, _)| index * 4)
        .take(4)
        .collect();
    match zeros[..] {
        [0, narrow] => Some(Lists {
            wide: &table[4..narrow],
            inverse: &[],
            narrow: &table[narrow + 4..],
        }),
        [0, inverse, narrow] => Some(Lists {
            wide: &table[4..inverse],
            inverse: &table[inverse + 4..narrow],
            narrow: &table[narrow + 4..],
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn tables_with_and_without_an_inverse_list() {
        let newer = table(&[0, 1, 2, 0, 3]);
        let lists_of = lists(&newer).unwrap();
        assert_eq!(
            (
                lists_of.wide.len(),
                lists_of.inverse.len(),
                lists_of.narrow.len()
            ),
            (8, 0, 4)
        );
        let older = table(&[0, 1, 0, 0, 3, 4]);
        let lists_of = lists(&older).unwrap();
        assert_eq!(
            (
                lists_of.wide.len(),
                lists_of.inverse.len(),
                lists_of.narrow.len()
            ),
            (4, 0, 8)
        );
        for odd in [&[][..], &[0], &[1, 0, 2], &[0, 0, 0, 0]] {
            assert_eq!(lists(&table(odd)), None, "{odd:?}");
        }
        assert_eq!(lists(&[0; 7]), None);
    }
}
