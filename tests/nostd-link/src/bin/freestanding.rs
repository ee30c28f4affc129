//! No std, no alloc, no C library: the kernel starts `_start`, and the exit status says which check failed.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(255)
}

fn exit(status: u8) -> ! {
    // SAFETY: exit_group(2) does not return and touches no memory of ours.
    unsafe { asm!("syscall", in("rax") 231, in("rdi") u64::from(status), options(noreturn, nostack)) }
}

/// The process's first instruction.
#[unsafe(no_mangle)]
#[unsafe(naked)]
extern "C" fn _start() -> ! {
    // The kernel aligns the stack to 16 and puts argc on it.
    naked_asm!("mov rdi, rsp", "call {main}", "ud2", main = sym start)
}

extern "C" fn start(stack: *const u64) -> ! {
    // SAFETY: argc is at the initial stack pointer; its value is not known to the compiler.
    let seed = unsafe { stack.read_volatile() };
    match nostd_link::run(seed) {
        Ok(()) => exit(0),
        Err(number) => exit(number),
    }
}

/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract; the direction flag is clear by the calling convention.
    unsafe { asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack)) };
    to
}

/// # Safety
/// As memmove(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: copying upwards never overwrites what is still to be read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller's contract; from the last byte down, and the flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len).sub(1) => _,
            inout("rsi") from.add(len).sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As memset(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract.
    unsafe { asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8, options(nostack)) };
    to
}

/// # Safety
/// As memcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut i = 0;
    while i < len {
        // SAFETY: i < len, the caller's contract. Volatile, so that this loop is not made a call of itself.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// # Safety
/// As bcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}
