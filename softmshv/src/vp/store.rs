//! Which instruction made a store that KVM has carried out, and the registers before it.
//!
//! KVM's own emulator (stores to read-only memory, and to space without a slot) reports a store when the instruction is
//! over: RIP is behind it, index registers and the stack pointer have moved. The client is to see it not executed. On an
//! engine that single-steps the registers before it are known. Elsewhere the instruction is the one that ends at RIP
//! and stores this very value at this very address; of several readings (a prefix can be told from the end of the
//! instruction before only by its effect) all have the same effect. What an exchange loaded and the flags before an
//! arithmetic instruction cannot be had back.

use iced_x86::{Instruction, InstructionInfoFactory};
use kvm_bindings::kvm_sync_regs;

use super::context::MmioAccess;
use super::fault::{Kind, Scene};
use super::port::undo_string_store;
use super::walk::Physical;

const MAX_INSTRUCTION: u64 = 15;

/// The registers before the store, when its instruction can be told. `left` are those KVM left, `before` those before
/// the last step of a single-stepping engine.
pub(super) fn origin<M: Physical + ?Sized>(
    memory: &M,
    factory: &mut InstructionInfoFactory,
    left: &kvm_sync_regs,
    before: Option<&kvm_sync_regs>,
    access: &MmioAccess,
) -> Option<kvm_sync_regs> {
    let mut stores = |at: &kvm_sync_regs, instruction: &Instruction| {
        Scene::new(&at.regs, &at.sregs, memory)
            .fault(instruction, factory)
            .is_some_and(|fault| fault.kind == Kind::Write && fault.gpa == access.gpa)
    };
    // A repeated string store leaves RIP where it is and the index registers one further.
    let mut origin = *left;
    if let Some(instruction) = decode(memory, &origin)
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
        && undo_string_store(&instruction, &mut origin.regs)
        && stores(&origin, &instruction)
    {
        return Some(origin);
    }
    // An interruption delivered first would make `before` that of another instruction.
    if let Some(before) = before
        && let Some(instruction) = decode(memory, before)
        && stores(before, &instruction)
    {
        return Some(*before);
    }
    let mut other = None;
    for length in 1..=MAX_INSTRUCTION {
        let mut origin = *left;
        origin.regs.rip = left.regs.rip.checked_sub(length)?;
        let Some(instruction) = decode(memory, &origin).filter(|it| it.len() as u64 == length)
        else {
            continue;
        };
        undo_string_store(&instruction, &mut origin.regs);
        let pushed = i64::from(instruction.stack_pointer_increment());
        origin.regs.rsp = origin.regs.rsp.wrapping_add_signed(-pushed);
        if !stores(&origin, &instruction) {
            continue;
        }
        match Scene::new(&origin.regs, &origin.sregs, memory).store(&instruction) {
            Some(store) if store.data() == access.data() => return Some(origin),
            Some(_) => {}
            None => other = Some(origin),
        }
    }
    other
}

fn decode<M: Physical + ?Sized>(memory: &M, at: &kvm_sync_regs) -> Option<Instruction> {
    let scene = Scene::new(&at.regs, &at.sregs, memory);
    let instruction = scene.instruction().ok()?;
    (!instruction.is_invalid()).then_some(instruction)
}

#[cfg(test)]
mod tests {
    use super::super::walk::bits::RFLAGS_DF;
    use super::super::walk::tests::Ram;
    use super::*;

    const NOTHING: u64 = 0x4_0000;

    /// Real mode after `code` at 0x1000 has run, with ES where nothing is.
    fn after(code: &[u8]) -> (Ram, kvm_sync_regs) {
        let ram = Ram::new(0x1_0000);
        ram.put(0x1000, code);
        let mut regs = kvm_sync_regs::default();
        regs.regs.rip = 0x1000 + code.len() as u64;
        regs.regs.rsp = 0x8000;
        regs.sregs.es.base = NOTHING;
        (ram, regs)
    }

    fn find(ram: &Ram, left: &kvm_sync_regs, offset: u64, data: &[u8]) -> Option<kvm_sync_regs> {
        let access = MmioAccess::store(NOTHING + offset, data);
        origin(ram, &mut InstructionInfoFactory::new(), left, None, &access)
    }

    #[test]
    fn the_value_tells_a_prefix_from_what_came_before() {
        // nop; es mov [bx], eax with an operand size prefix
        let (ram, mut left) = after(&[0x90, 0x26, 0x66, 0x89, 0x07]);
        left.regs.rax = 0x1122_3344;
        let found = find(&ram, &left, 0, &[0x44, 0x33, 0x22, 0x11]).unwrap();
        assert_eq!(found.regs.rip, 0x1001);
        // Two bytes stored: the prefix belongs elsewhere, and the segment with it.
        assert!(find(&ram, &left, 0, &[0x44, 0x33]).is_none());
        let (ram, mut left) = after(&[0xb0, 0x66, 0x26, 0x89, 0x07]);
        left.regs.rax = 0x1122_3344;
        let found = find(&ram, &left, 0, &[0x44, 0x33]).unwrap();
        assert_eq!(found.regs.rip, 0x1002);
    }

    #[test]
    fn string_stores_go_back_one_element() {
        // rep stosw, in the middle; then stosb, done
        let (ram, mut left) = after(&[0xf3, 0xab]);
        (left.regs.rip, left.regs.rdi, left.regs.rcx) = (0x1000, 0x12, 3);
        let found = find(&ram, &left, 0x10, &[0, 0]).unwrap();
        assert_eq!(
            (found.regs.rip, found.regs.rdi, found.regs.rcx),
            (0x1000, 0x10, 4)
        );
        let (ram, mut left) = after(&[0xaa]);
        left.regs.rflags = RFLAGS_DF;
        left.regs.rdi = 0x0f;
        let found = find(&ram, &left, 0x10, &[0]).unwrap();
        assert_eq!((found.regs.rip, found.regs.rdi), (0x1000, 0x10));
    }

    #[test]
    fn a_push_goes_back_to_the_stack_before() {
        let (ram, mut left) = after(&[0x50]);
        left.sregs.ss.base = NOTHING;
        left.regs.rsp = 0x7ffe;
        let found = find(&ram, &left, 0x7ffe, &[0, 0]).unwrap();
        assert_eq!((found.regs.rip, found.regs.rsp), (0x1000, 0x8000));
    }

    #[test]
    fn the_step_before_is_believed_when_it_fits() {
        // es mov [0], al
        let (ram, left) = after(&[0x26, 0xa2, 0, 0]);
        let mut before = left;
        before.regs.rip = 0x1000;
        let access = MmioAccess::store(NOTHING, &[0]);
        let mut factory = InstructionInfoFactory::new();
        let found = origin(&ram, &mut factory, &left, Some(&before), &access).unwrap();
        assert_eq!(found.regs.rip, 0x1000);
        // An interrupted NOP is no store.
        before.regs.rip = 0x2000;
        ram.put(0x2000, &[0x90]);
        let found = origin(&ram, &mut factory, &left, Some(&before), &access).unwrap();
        assert_eq!(found.regs.rip, 0x1000);
    }
}
