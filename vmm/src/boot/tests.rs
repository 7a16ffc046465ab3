//! Boot structures, placement and limits, on kernels made up for the purpose.

use std::{
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use linux_loader::bootparam::{boot_params, setup_header};
use vm_memory::ByteValued;

use super::*;
use crate::layout;

const RAM: u64 = 128 << 20;
const PREFERRED: u64 = 16 << 20;

/// A file that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(contents: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "rota-boot-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::write(&path, contents).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn machine() -> Machine {
    Machine {
        memory_map: layout::memory_map(RAM).unwrap(),
        rsdp: layout::ACPI_TABLES,
        low_ram_end: RAM,
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

/// A bzImage with one setup sector and a kernel of 4 KiB of 0xcc.
fn bzimage(change: fn(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: 256,
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        xloadflags: 1,
        code32_start: 1 << 20,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 255,
        pref_address: PREFERRED,
        init_size: 32 << 20,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; 1024];
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.resize(1024 + 4096, 0xcc);
    image
}

fn payload(kernel: &Scratch, cmdline: &str, initramfs: Option<&Scratch>) -> PayloadConfig {
    PayloadConfig {
        kernel: kernel.0.clone(),
        cmdline: Some(cmdline.to_owned()),
        initramfs: initramfs.map(|file| file.0.clone()),
    }
}

fn refusal(kernel: &[u8]) -> String {
    let kernel = Scratch::new(kernel);
    let error = load(&memory(), &payload(&kernel, "", None), &machine())
        .unwrap_err()
        .to_string();
    assert!(
        !error.contains('\n') && error.contains(kernel.0.to_str().unwrap()),
        "{error}"
    );
    error
}

#[test]
fn a_bzimage_is_laid_out_as_the_protocol_says() {
    let kernel = Scratch::new(&bzimage(|_| {}));
    let initramfs = Scratch::new(&[0x5a; 5000]);
    let memory = memory();
    let start = load(
        &memory,
        &payload(&kernel, "quiet", Some(&initramfs)),
        &machine(),
    )
    .unwrap();
    let Start::Linux64 {
        entry,
        zero_page,
        page_tables,
    } = start
    else {
        panic!("{start:?}")
    };
    assert_eq!(entry, PREFERRED + 0x200);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(entry)).unwrap(), 0xcc);

    let params: boot_params = memory.read_obj(GuestAddress(zero_page)).unwrap();
    assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_TABLES);
    assert_eq!(params.e820_entries, 4);
    let high = params.e820_table[2];
    assert_eq!(
        ({ high.addr }, { high.size }, { high.r#type }),
        (1 << 20, RAM - (1 << 20), 1)
    );
    let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((u64::from(image), size), (RAM - 8192, 5000));
    let mut bytes = [0; 5001];
    memory
        .read_slice(&mut bytes, GuestAddress(image.into()))
        .unwrap();
    assert!(bytes[..5000].iter().all(|byte| *byte == 0x5a) && bytes[5000] == 0);
    let mut cmdline = [0xff; 6];
    memory
        .read_slice(&mut cmdline, GuestAddress(params.hdr.cmd_line_ptr.into()))
        .unwrap();
    assert_eq!(&cmdline, b"quiet\0");

    // The page tables map 3.5 GiB + 5 MiB to itself.
    let address = (7u64 << 29) + (5 << 20);
    let entry = |table: u64, shift: u32| -> u64 {
        memory
            .read_obj(GuestAddress(
                (table & !0xfff) + ((address >> shift) & 0x1ff) * 8,
            ))
            .unwrap()
    };
    let page = entry(entry(entry(page_tables, 39), 30), 21);
    assert_eq!(page & 0x83, 0x83);
    assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
}

#[test]
fn what_is_no_whole_kernel_is_refused_in_one_line() {
    assert!(refusal(b"").contains("neither a bzImage nor an ELF"));
    assert!(refusal(&[0; 8192]).contains("neither a bzImage nor an ELF"));
    assert!(refusal(&bzimage(|h| h.version = 0x0204)).contains("0x0204"));
    assert!(refusal(&bzimage(|h| h.xloadflags = 0)).contains("64-bit entry"));
    assert!(refusal(&bzimage(|h| h.loadflags = 0)).contains("zImage"));
    assert!(refusal(&bzimage(|_| {})[..3000]).contains("truncated"));
    assert!(refusal(&bzimage(|h| h.init_size = 1 << 30)).contains("more memory"));
    assert!(refusal(&bzimage(|h| h.pref_address = u64::MAX - 4)).contains("more memory"));
    assert!(refusal(b"\x7fELF and then nothing").contains("corrupt or truncated"));
}

#[test]
fn missing_files_are_named_with_the_reason() {
    let config = PayloadConfig {
        kernel: "/nonexistent".into(),
        cmdline: None,
        initramfs: None,
    };
    let error = load(&memory(), &config, &machine()).unwrap_err();
    assert_eq!(error.to_string(), "kernel /nonexistent: cannot be read");
    let config = PayloadConfig {
        kernel: std::env::temp_dir(),
        cmdline: None,
        initramfs: None,
    };
    let error = load(&memory(), &config, &machine()).unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("directory"), "{source}");
}

#[test]
fn an_initramfs_that_does_not_fit_is_refused() {
    let kernel = Scratch::new(&bzimage(|_| {}));
    // 128 MiB less 16 MiB below the kernel and 32 MiB for it leave 80 MiB.
    for (mib, fits) in [(80, true), (81, false)] {
        let initramfs = Scratch::new(&[]);
        fs::OpenOptions::new()
            .write(true)
            .open(&initramfs.0)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        let result = load(
            &memory(),
            &payload(&kernel, "", Some(&initramfs)),
            &machine(),
        );
        assert_eq!(result.is_ok(), fits);
        if let Err(error) = result {
            assert!(
                error
                    .to_string()
                    .contains("84934656 bytes do not fit the 83886080"),
                "{error}"
            );
        }
    }
}

#[test]
fn the_command_line_limit_is_the_kernels() {
    let kernel = Scratch::new(&bzimage(|_| {}));
    let with = |cmdline: &str| load(&memory(), &payload(&kernel, cmdline, None), &machine());
    assert!(with(&"x".repeat(255)).is_ok());
    let error = with(&"x".repeat(256)).unwrap_err().to_string();
    assert_eq!(error, "cmdline: 256 bytes, the kernel takes at most 255");
    assert!(with("a\0b").unwrap_err().to_string().contains("NUL"));
}

/// An ELF image with one loadable segment at 16 MiB and, if asked, a PVH note.
fn elf(pvh: bool) -> Vec<u8> {
    let mut image = vec![0; 0x200];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    let put = |image: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(&mut image, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut image, 24, &PREFERRED.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, 1 + u8::from(pvh), 0]);
    let mut segment = |index: usize, kind: u32, offset: u64, address: u64, size: u64| {
        let at = 64 + index * 56;
        put(&mut image, at, &kind.to_le_bytes());
        for (field, value) in [
            (8, offset),
            (16, address),
            (24, address),
            (32, size),
            (40, size),
            (48, 4),
        ] {
            put(&mut image, at + field, &value.to_le_bytes());
        }
    };
    segment(0, 1, 0x100, PREFERRED, 0x100);
    if pvh {
        segment(1, 4, 0x1c0, 0, 24);
    }
    // namesz 4, descsz 8, type 18 (PHYS32_ENTRY), "Xen\0", the entry point.
    put(&mut image, 0x1c0, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x1cc, b"Xen\0");
    put(&mut image, 0x1d0, &(PREFERRED + 0x40).to_le_bytes());
    image
}

#[test]
fn an_elf_image_starts_at_its_pvh_entry_with_start_info() {
    let kernel = Scratch::new(&elf(true));
    let initramfs = Scratch::new(&[7; 100]);
    let memory = memory();
    let start = load(
        &memory,
        &payload(&kernel, "pvh", Some(&initramfs)),
        &machine(),
    )
    .unwrap();
    let Start::Pvh { entry, start_info } = start else {
        panic!("{start:?}")
    };
    assert_eq!(entry, PREFERRED + 0x40);
    let word = |offset| {
        memory
            .read_obj::<u64>(GuestAddress(start_info + offset))
            .unwrap()
    };
    assert_eq!(word(0), 1 << 32 | 0x336e_c578);
    assert_eq!(word(8) >> 32, 1, "one module");
    assert_eq!(word(24), layout::CMDLINE);
    assert_eq!(word(32), layout::ACPI_TABLES);
    let module: u64 = memory.read_obj(GuestAddress(word(16))).unwrap();
    assert_eq!(module, RAM - 4096);
    assert_eq!(word(48), 4, "memory map entries");
    let second: u64 = memory.read_obj(GuestAddress(word(40) + 24)).unwrap();
    assert_eq!(second, layout::RESERVED_LOW_START);
}

#[test]
fn an_elf_image_without_pvh_entry_or_cut_short_is_refused() {
    assert!(refusal(&elf(false)).contains("PVH"));
    assert!(refusal(&elf(true)[..0x180]).contains("corrupt or truncated"));
}

#[test]
fn an_elf_image_larger_than_the_memory_says_what_it_needs() {
    let memory_size = |size: u64| {
        let mut image = elf(true);
        image[64 + 40..64 + 48].copy_from_slice(&size.to_le_bytes());
        image
    };
    let error = refusal(&memory_size(RAM - PREFERRED + 1));
    assert!(error.contains("needs RAM up to 0x8000001"), "{error}");
    assert!(error.contains("more memory"), "{error}");
    assert!(refusal(&memory_size(u64::MAX)).contains("more memory"));
    let fits = Scratch::new(&memory_size(RAM - PREFERRED));
    assert!(load(&memory(), &payload(&fits, "", None), &machine()).is_ok());
}

/// A segment of zeros takes memory and no byte of the file: nothing may be put there.
#[test]
fn an_initramfs_stays_clear_of_a_segment_without_contents() {
    let mut image = elf(true);
    image[56] = 3;
    let at = 64 + 2 * 56;
    image[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
    // All that there is up to the last page.
    let size = RAM - PREFERRED - layout::PAGE_SIZE;
    for (field, value) in [(24, PREFERRED), (40, size)] {
        image[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
    }
    let kernel = Scratch::new(&image);
    for (length, fits) in [(4096, true), (4097, false)] {
        let initramfs = Scratch::new(&vec![1; length]);
        let result = load(
            &memory(),
            &payload(&kernel, "", Some(&initramfs)),
            &machine(),
        );
        assert_eq!(result.is_ok(), fits, "{length}: {result:?}");
    }
}

/// A bzImage whose payload is an ELF image in two LZ4 blocks, with relocations behind it: one 64-bit field.
fn packed_bzimage() -> Vec<u8> {
    const FIELD: u32 = 0x8100_0080;
    let mut unpacked = elf(true);
    unpacked[0x180..0x188].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    for word in [0, FIELD, 0] {
        unpacked.extend_from_slice(&word.to_le_bytes());
    }
    let mut packed = 0x184c_2102u32.to_le_bytes().to_vec();
    for block in [&unpacked[..0x1a0], &unpacked[0x1a0..]] {
        let block = lz4_flex::block::compress(block);
        packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend_from_slice(&block);
    }
    packed.extend_from_slice(&u32::try_from(unpacked.len()).unwrap().to_le_bytes());
    let mut image = bzimage(|header| header.kernel_alignment = 2 << 20);
    let mut header = setup_header::default();
    header
        .as_mut_slice()
        .copy_from_slice(&image[0x1f1..0x1f1 + size_of::<setup_header>()]);
    header.payload_offset = 0x100;
    header.payload_length = u32::try_from(packed.len()).unwrap();
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image[0x500..0x500 + packed.len()].copy_from_slice(&packed);
    image
}

#[test]
fn a_packed_kernel_is_unpacked_to_its_place() {
    let kernel = Scratch::new(&packed_bzimage());
    for cmdline in ["nokaslr", ""] {
        let memory = memory();
        let start = load(&memory, &payload(&kernel, cmdline, None), &machine()).unwrap();
        let Start::Linux64 {
            entry, zero_page, ..
        } = start
        else {
            panic!("{start:?}")
        };
        assert_eq!(entry, PREFERRED, "the ELF image's entry");
        // The segment's first byte is the file's at 0x100; the relocated field lies at 0x180.
        let field: u64 = memory.read_obj(GuestAddress(PREFERRED + 0x80)).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(zero_page)).unwrap();
        let moved = field.wrapping_sub(0x1122_3344_5566_7788);
        let randomized = params.hdr.loadflags & 2 != 0;
        assert_eq!(randomized, cmdline.is_empty());
        assert!(
            moved.is_multiple_of(2 << 20) && moved < 1 << 30,
            "{moved:#x}"
        );
        assert!(randomized || moved == 0);
    }
}

#[test]
fn a_damaged_payload_is_named() {
    let damaged = |change: fn(&mut Vec<u8>)| {
        let mut image = packed_bzimage();
        change(&mut image);
        refusal(&image)
    };
    let length = 0x1f1 + std::mem::offset_of!(setup_header, payload_length);
    assert_eq!(length, 0x24c, "as the boot protocol says");
    // A block as long as this would be made room for, were it not for the file's length.
    assert!(
        damaged(|image| {
            image[0x24c..0x250].copy_from_slice(&0xf000_0000u32.to_le_bytes());
            image[0x504..0x508].copy_from_slice(&0xe000_0000u32.to_le_bytes());
        })
        .contains("its payload ends behind the file")
    );
    assert!(
        damaged(|image| image[0x504..0x508].copy_from_slice(&0x1000u32.to_le_bytes()))
            .contains("longer than the payload")
    );
    assert!(damaged(|image| image[0x508..0x540].fill(0xff)).contains("damaged LZ4"));
}

/// Whatever is wrong with a kernel, the answer is a guest that may fail or one line, and never a panic.
#[test]
fn no_damage_makes_the_loader_panic() {
    let memory = memory();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % limit
    };
    let (mut loaded, mut refused) = (0, 0);
    for round in 0..3000 {
        // Where the headers are, and the packed payload with its own.
        let (mut image, span) = match round % 3 {
            0 => (elf(true), 0..0x1d8),
            1 => (packed_bzimage(), 0x1f1..0x270),
            _ => (packed_bzimage(), 0x500..0x700),
        };
        for _ in 0..=random(3) {
            let at = span.start + random(span.len());
            let odd = [0, 1, 0x7f, 0x80, 0xfe, 0xff, random(256) as u8];
            let length = [1, 1, 4, 8][random(4)].min(span.end - at);
            let byte = odd[random(odd.len())];
            image[at..at + length].fill(byte);
        }
        if random(8) == 0 {
            image.truncate(random(image.len()));
        }
        let kernel = Scratch::new(&image);
        match load(&memory, &payload(&kernel, "", None), &machine()) {
            Ok(_) => loaded += 1,
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                refused += 1;
            }
        }
    }
    assert!(loaded > 100 && refused > 1000, "{loaded}, {refused}");
}
