//! Which instruction a `KVM_EXIT_IO` belongs to, and the registers before it.
//!
//! KVM leaves the registers of IN, OUT and INS as they were before the instruction. OUTS it has carried out for one
//! value already: RSI and RCX have moved, and without REP so has RIP. The client is to see the instruction not
//! executed, so that one value is taken back.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_regs;

use super::context::PortAccess;
use super::decode::{Code, code_bits, register_value};
use super::fault::Scene;
use super::message::Port;
use super::walk::bits::RFLAGS_DF;
use super::walk::{Access, Physical};

/// Prefixes an OUTS can have: operand and address size, segments, and one of REX.
const MAX_PREFIXES: u64 = 5;

/// A port access traced back to its instruction.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// What the client is told.
    pub(super) port: Port,
    /// Registers before the instruction.
    pub(super) regs: kvm_regs,
    /// The instruction's bytes.
    pub(super) code: Code,
}

/// What the bytes around RIP say about an access.
#[derive(Debug)]
pub(super) enum Answer {
    /// This is it.
    Found(Found),
    /// The OUT at RIP, or else an OUTS just before it: KVM tells by moving RIP past an OUT it has pending.
    Ambiguous(Found),
}

impl Answer {
    /// The more likely reading.
    pub(super) fn found(self) -> Found {
        match self {
            Self::Found(found) | Self::Ambiguous(found) => found,
        }
    }
}

/// The string operand of INS or OUTS: how much of the index and count registers it uses.
fn index_mask(instruction: &Instruction) -> Option<u64> {
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    kinds.into_iter().find_map(|kind| match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(0xffff),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(0xffff_ffff),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(u64::MAX),
        _ => None,
    })
}

fn is_ins(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd
    )
}

fn is_outs(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd
    )
}

fn is_out(instruction: &Instruction, access: &PortAccess, regs: &kvm_regs) -> bool {
    instruction.mnemonic() == Mnemonic::Out
        && width(instruction) == access.size
        && out_port(instruction, regs) == access.port
}

fn has_rep(instruction: &Instruction) -> bool {
    instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

/// Bytes per value of an IN, OUT, INS or OUTS.
fn width(instruction: &Instruction) -> u8 {
    match instruction.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        Mnemonic::Insd | Mnemonic::Outsd => 4,
        _ => [instruction.op0_register(), instruction.op1_register()]
            .into_iter()
            .find_map(|register| match register {
                Register::AL => Some(1),
                Register::AX => Some(2),
                Register::EAX => Some(4),
                _ => None,
            })
            .unwrap_or(0),
    }
}

/// The port an OUT at hand writes to.
fn out_port(instruction: &Instruction, regs: &kvm_regs) -> u16 {
    match instruction.op0_kind() {
        OpKind::Immediate8 => instruction.immediate8().into(),
        _ => regs.rdx as u16,
    }
}

/// `value` moved by `delta` within `mask`.
fn moved(value: u64, delta: u64, mask: u64) -> u64 {
    value & !mask | value.wrapping_add(delta) & mask
}

/// From one value of a string operation to the next.
fn stride(rflags: u64, size: u8) -> u64 {
    let size = u64::from(size);
    if rflags & RFLAGS_DF == 0 {
        size
    } else {
        size.wrapping_neg()
    }
}

/// `Found` for an instruction.
fn found(access: &PortAccess, instruction: &Instruction, regs: kvm_regs, code: Code) -> Found {
    let string = is_ins(instruction) || is_outs(instruction);
    Found {
        port: Port {
            number: access.port,
            size: access.size,
            write: access.out,
            string,
            rep: string && has_rep(instruction),
            length: instruction.len(),
        },
        regs,
        code,
    }
}

/// An access whose instruction cannot be read: the client learns the port and value, and no length.
fn unknown(access: &PortAccess, regs: kvm_regs) -> Found {
    Found {
        port: Port {
            number: access.port,
            size: access.size,
            write: access.out,
            string: false,
            rep: false,
            length: 0,
        },
        regs,
        code: Code::default(),
    }
}

/// An OUT or OUTS that KVM has carried out, given the registers from before it ran and the RIP it has come to. None when
/// they do not fit: then an interruption was delivered first, and the instruction is one of its handler.
pub(super) fn carried_out<M: Physical + ?Sized>(
    before: &Scene<'_, M>,
    access: &PortAccess,
    rip: u64,
) -> Option<Found> {
    let (instruction, code) = decode_at(before, before.regs.rip)?;
    let end = before.regs.rip.wrapping_add(instruction.len() as u64);
    let fits = if is_outs(&instruction) {
        rip == end || has_rep(&instruction) && rip == before.regs.rip
    } else {
        is_out(&instruction, access, before.regs) && rip == end
    };
    (fits && width(&instruction) == access.size)
        .then(|| found(access, &instruction, *before.regs, code))
}

/// The access with the registers KVM left; `data` is what the guest writes.
pub(super) fn identify<M: Physical + ?Sized>(
    scene: &Scene<'_, M>,
    access: &PortAccess,
    data: &[u8],
) -> Answer {
    let at = decode_at(scene, scene.regs.rip);
    if !access.out {
        return Answer::Found(at.map_or_else(
            || unknown(access, *scene.regs),
            |(instruction, code)| found(access, &instruction, *scene.regs, code),
        ));
    }
    match at {
        Some((instruction, code)) if is_out(&instruction, access, scene.regs) => {
            let plain = found(access, &instruction, *scene.regs, code);
            if completed_outs(scene, access, data).is_some() {
                Answer::Ambiguous(plain)
            } else {
                Answer::Found(plain)
            }
        }
        Some((instruction, code))
            if is_outs(&instruction)
                && has_rep(&instruction)
                && width(&instruction) == access.size =>
        {
            let mask = index_mask(&instruction).unwrap_or(u64::MAX);
            let mut regs = *scene.regs;
            regs.rsi = moved(
                regs.rsi,
                stride(regs.rflags, access.size).wrapping_neg(),
                mask,
            );
            regs.rcx = moved(regs.rcx, 1, mask);
            Answer::Found(found(access, &instruction, regs, code))
        }
        _ => Answer::Found(
            completed_outs(scene, access, data).unwrap_or_else(|| unknown(access, *scene.regs)),
        ),
    }
}

/// The plain OUT that ends at RIP, on a KVM that carries out even those.
pub(super) fn completed_out<M: Physical + ?Sized>(
    scene: &Scene<'_, M>,
    access: &PortAccess,
) -> Option<Found> {
    (1..=2 + MAX_PREFIXES).find_map(|length| {
        let mut regs = *scene.regs;
        regs.rip = regs.rip.checked_sub(length)?;
        let (instruction, code) = decode_at(scene, regs.rip)?;
        let fits = is_out(&instruction, access, &regs) && instruction.len() as u64 == length;
        fits.then(|| found(access, &instruction, regs, code))
    })
}

/// The OUTS without REP that ends at RIP and wrote `data`, if there is one. Bytes before an instruction cannot be
/// told from its prefixes, so the shortest reading that explains the data wins.
pub(super) fn completed_outs<M: Physical + ?Sized>(
    scene: &Scene<'_, M>,
    access: &PortAccess,
    data: &[u8],
) -> Option<Found> {
    let after = *scene.regs;
    let mut any = None;
    for length in 1..=1 + MAX_PREFIXES {
        let Some(rip) = after.rip.checked_sub(length) else {
            break;
        };
        let Some((instruction, code)) = decode_at(scene, rip) else {
            continue;
        };
        let fits = is_outs(&instruction)
            && !has_rep(&instruction)
            && instruction.len() as u64 == length
            && width(&instruction) == access.size;
        let Some(mask) = index_mask(&instruction).filter(|_| fits) else {
            continue;
        };
        let mut regs = after;
        regs.rip = rip;
        regs.rsi = moved(
            regs.rsi,
            stride(regs.rflags, access.size).wrapping_neg(),
            mask,
        );
        let candidate = found(access, &instruction, regs, code);
        let base = register_value(instruction.memory_segment(), &regs, scene.sregs).unwrap_or(0);
        let mut source = [0; 4];
        let source = &mut source[..data.len().min(4)];
        if peek(scene, base.wrapping_add(regs.rsi & mask), source) && source == data {
            return Some(candidate);
        }
        any.get_or_insert(candidate);
    }
    any
}

/// What memory holds where an INS is about to store: with it in KVM's buffer, letting KVM finish changes nothing.
pub(super) fn preserve<M: Physical + ?Sized>(
    scene: &Scene<'_, M>,
    access: &PortAccess,
    data: &mut [u8],
) {
    let Some((instruction, _)) = decode_at(scene, scene.regs.rip) else {
        return;
    };
    let Some(mask) = index_mask(&instruction).filter(|_| is_ins(&instruction)) else {
        return;
    };
    let base = register_value(Register::ES, scene.regs, scene.sregs).unwrap_or(0);
    let mut index = scene.regs.rdi;
    for value in data.chunks_mut(usize::from(access.size.max(1))) {
        peek(scene, base.wrapping_add(index & mask), value);
        index = index.wrapping_add(stride(scene.regs.rflags, access.size));
    }
}

/// Reads guest memory at a linear address, a byte at a time since it may cross pages.
fn peek<M: Physical + ?Sized>(scene: &Scene<'_, M>, linear: u64, bytes: &mut [u8]) -> bool {
    bytes.iter_mut().zip(0..).all(|(byte, offset)| {
        let linear = linear.wrapping_add(offset);
        let linear = if code_bits(scene.sregs) == 64 {
            linear
        } else {
            linear & 0xffff_ffff
        };
        scene
            .translate(linear, Access::default())
            .is_ok_and(|gpa| scene.memory.read(gpa, std::slice::from_mut(byte)).is_ok())
    })
}

fn decode_at<M: Physical + ?Sized>(scene: &Scene<'_, M>, rip: u64) -> Option<(Instruction, Code)> {
    let code = scene.code_at(rip).ok()?;
    let instruction = code.decode(scene.sregs, rip).ok()?;
    (!instruction.is_invalid()).then_some((instruction, code))
}

/// The registers after one more value of a string store, taken back: KVM reports a store when it is done.
pub(super) fn undo_string_store(instruction: &Instruction, regs: &mut kvm_regs) -> bool {
    let (loads, size) = match instruction.mnemonic() {
        Mnemonic::Movsb => (true, 1),
        Mnemonic::Movsw => (true, 2),
        Mnemonic::Movsd if instruction.op0_kind() != OpKind::Register => (true, 4),
        Mnemonic::Movsq => (true, 8),
        Mnemonic::Stosb => (false, 1),
        Mnemonic::Stosw => (false, 2),
        Mnemonic::Stosd => (false, 4),
        Mnemonic::Stosq => (false, 8),
        _ => return false,
    };
    let Some(mask) = index_mask(instruction) else {
        return false;
    };
    let back = stride(regs.rflags, size).wrapping_neg();
    regs.rdi = moved(regs.rdi, back, mask);
    if loads {
        regs.rsi = moved(regs.rsi, back, mask);
    }
    if has_rep(instruction) {
        regs.rcx = moved(regs.rcx, 1, mask);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::walk::tests::Ram;
    use super::*;
    use kvm_bindings::kvm_sregs;

    fn access(out: bool, size: u8, port: u16) -> PortAccess {
        PortAccess::new(out, size, port)
    }

    struct Machine {
        ram: Ram,
        sregs: kvm_sregs,
        regs: kvm_regs,
    }

    impl Machine {
        /// Real mode with `code` at 0x1000.
        fn new(code: &[u8]) -> Self {
            let ram = Ram::new(0x1_0000);
            ram.put(0x1000, code);
            let regs = kvm_regs {
                rip: 0x1000,
                rdx: 0x3f8,
                rsi: 0x2000,
                rdi: 0x3000,
                rcx: 3,
                rflags: 2,
                ..Default::default()
            };
            Self {
                ram,
                sregs: kvm_sregs::default(),
                regs,
            }
        }

        fn identify(&self, access: &PortAccess, data: &[u8]) -> Answer {
            identify(
                &Scene::new(&self.regs, &self.sregs, &self.ram),
                access,
                data,
            )
        }
    }

    #[test]
    fn in_and_out_are_at_rip() {
        let machine = Machine::new(&[0xec]);
        let got = machine.identify(&access(false, 1, 0x3f8), &[]).found();
        assert_eq!((got.port.length, got.port.string), (1, false));
        assert_eq!(got.regs, machine.regs);
        // out 0x80, ax with an operand size prefix in 16-bit code is out 0x80, eax.
        let machine = Machine::new(&[0x66, 0xe7, 0x80]);
        let Answer::Found(got) = machine.identify(&access(true, 4, 0x80), &[0; 4]) else {
            panic!()
        };
        assert_eq!(got.port.length, 3);
    }

    #[test]
    fn a_rep_outs_is_taken_back_by_one_value() {
        let mut machine = Machine::new(&[0xf3, 0x6f]);
        machine.regs.rsi = 0x2002;
        machine.regs.rcx = 2;
        let got = machine.identify(&access(true, 2, 0x3f8), &[0, 0]).found();
        assert_eq!(
            (got.regs.rsi, got.regs.rcx, got.regs.rip),
            (0x2000, 3, 0x1000)
        );
        assert!(got.port.string && got.port.rep);
        machine.regs.rflags |= RFLAGS_DF;
        machine.regs.rsi = 0xfffe;
        let got = machine.identify(&access(true, 2, 0x3f8), &[0, 0]).found();
        assert_eq!(got.regs.rsi & 0xffff, 0);
    }

    #[test]
    fn a_single_outs_is_found_behind_rip() {
        let mut machine = Machine::new(&[0x90, 0x26, 0x6e, 0x90]);
        machine.sregs.es.base = 0x500;
        machine.ram.put(0x2500, &[0x42]);
        machine.regs.rip = 0x1003;
        machine.regs.rsi = 0x2001;
        let got = machine.identify(&access(true, 1, 0x3f8), &[0x42]).found();
        assert_eq!(
            (got.regs.rip, got.regs.rsi, got.port.length),
            (0x1001, 0x2000, 2)
        );
        // Without the override the data would be that of DS.
        machine.ram.put(0x2000, &[0x43]);
        let got = machine.identify(&access(true, 1, 0x3f8), &[0x43]).found();
        assert_eq!((got.regs.rip, got.port.length), (0x1002, 1));
    }

    #[test]
    fn outs_then_out_is_ambiguous() {
        let mut machine = Machine::new(&[0x6e, 0xee]);
        machine.regs.rip = 0x1001;
        let answer = machine.identify(&access(true, 1, 0x3f8), &[0]);
        assert!(matches!(answer, Answer::Ambiguous(_)));
        let scene = Scene::new(&machine.regs, &machine.sregs, &machine.ram);
        assert_eq!(
            completed_outs(&scene, &access(true, 1, 0x3f8), &[0])
                .unwrap()
                .regs
                .rip,
            0x1000
        );
    }

    #[test]
    fn an_ins_finds_its_memory_unchanged() {
        let mut machine = Machine::new(&[0xf3, 0x6d]);
        machine.ram.put(0x3000, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        let ins = access(false, 2, 0x3f8);
        preserve(
            &Scene::new(&machine.regs, &machine.sregs, &machine.ram),
            &ins,
            &mut data,
        );
        assert_eq!(data, [1, 2, 3, 4]);
        machine.regs.rflags |= RFLAGS_DF;
        machine.regs.rdi = 0x3002;
        preserve(
            &Scene::new(&machine.regs, &machine.sregs, &machine.ram),
            &ins,
            &mut data,
        );
        assert_eq!(data, [3, 4, 1, 2]);
    }
}
