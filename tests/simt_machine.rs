//! The simulator, against kernels that are wrong.

use atkd::plan::LaunchShape;
use atkd::simt::machine::{Buffer, Kernel, run};

/// The layout is that of `kernels/simt/broken.cpp`.
#[repr(C)]
struct Broken {
    data: *mut u32,
}

/// The layout is that of `kernels/simt/broken.cpp`.
#[repr(C)]
struct StagedRows {
    from: *const u32,
    to: *mut u32,
    rows: u32,
}

unsafe extern "C" {
    fn broken_missing_barrier(parameters: &Broken);
    fn broken_missing_warp_barrier(parameters: &Broken);
    fn broken_addition(parameters: &Broken);
    fn broken_arrival_for_others(parameters: &Broken);
    fn broken_divergent_barrier(parameters: &Broken);
    fn broken_two_barriers(parameters: &Broken);
    fn broken_shuffle(parameters: &Broken);
    fn broken_read_outside(parameters: &Broken);
    fn broken_write_outside(parameters: &Broken);
    fn broken_alignment(parameters: &Broken);
    fn broken_unwritten_shared(parameters: &Broken);
    fn broken_shared_bounds(parameters: &Broken);
    fn broken_missing_cluster_barrier(parameters: &Broken);
    fn broken_cluster_barrier(parameters: &Broken);
    fn broken_remote(parameters: &Broken);
    fn broken_team(parameters: &Broken);
    fn broken_rank(parameters: &Broken);
    fn broken_unwaited_read(parameters: &Broken);
    fn broken_early_parity(parameters: &Broken);
    fn broken_late_parity(parameters: &Broken);
    fn broken_few_bytes(parameters: &Broken);
    fn broken_many_bytes(parameters: &Broken);
    fn broken_arrivals(parameters: &Broken);
    fn broken_early_barrier(parameters: &Broken);
    fn broken_refill_of_the_read(parameters: &Broken);
    fn broken_bulk_alignment(parameters: &Broken);
    fn broken_bulk_size(parameters: &Broken);
    fn broken_bulk_outside(parameters: &Broken);
    fn broken_prefetch_size(parameters: &Broken);
    fn broken_prefetch_outside(parameters: &Broken);
    fn broken_staged_bounds(parameters: &Broken);
    fn broken_unwaited_load(parameters: &Broken);
    fn broken_copy_before_its_wait(parameters: &Broken);
    fn broken_copy_of_another(parameters: &Broken);
    fn broken_barrier_for_copies(parameters: &Broken);
    fn broken_copy_over_the_read(parameters: &Broken);
    fn broken_element_over_the_read(parameters: &Broken);
    fn broken_unwaited_copy(parameters: &Broken);
    fn broken_copy_alignment(parameters: &Broken);
    fn broken_copy_outside(parameters: &Broken);
    fn broken_copy_bounds(parameters: &Broken);
    fn broken_post(parameters: &Broken);
    fn staged_rows(parameters: &StagedRows);
}

/// The memory that a block of two warps, or two blocks of one, of a broken kernel leave behind.
fn broken(kernel: Kernel<Broken>, cluster: u32, seed: u64) -> Result<[u32; 64], String> {
    let shape = LaunchShape { grid: cluster, block: 64 / cluster, cluster, team: 1, shared: 512 };
    broken_in(shape, kernel, seed)
}

fn broken_in(shape: LaunchShape, kernel: Kernel<Broken>, seed: u64) -> Result<[u32; 64], String> {
    #[repr(align(16))]
    struct Memory([u32; 64]);
    let mut memory = Memory([0; 64]);
    let parameters = Broken { data: memory.0.as_mut_ptr() };
    let mut buffers = [Buffer::output("data", &mut memory.0)];
    // SAFETY: the kernel's parameters are these.
    unsafe { run("broken", shape, seed, kernel, &parameters, &mut buffers)? };
    Ok(memory.0)
}

#[track_caller]
fn caught(kernel: Kernel<Broken>, cluster: u32, words: &[&str]) {
    let message = broken(kernel, cluster, 3).expect_err("the mistake must be found");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

/// Whichever access comes first.
#[test]
fn races() {
    for (kernel, cluster, words) in [
        (broken_missing_barrier as Kernel<Broken>, 1, "of cells["),
        (broken_missing_cluster_barrier, 2, "of cells["),
        (broken_missing_warp_barrier, 1, "of cells["),
        (broken_addition, 1, "of cells[0] races"),
        (broken_arrival_for_others, 1, "bulk load of staged memory that another thread may still"),
    ] {
        for seed in 0..9 {
            let fault = broken(kernel, cluster, seed).unwrap_err();
            assert!(fault.contains(words), "{fault}");
        }
    }
}

#[test]
fn barriers_that_threads_never_reach() {
    caught(broken_divergent_barrier, 1, &["block 0", "deadlock", "32 threads", "line", "ended"]);
    caught(broken_two_barriers, 1, &["deadlock", "barrier in line"]);
    caught(broken_cluster_barrier, 2, &["deadlock", "cluster's barrier", "of block 1 have ended"]);
    caught(
        broken_shuffle,
        1,
        &["deadlock", "rest of their warp", "2 threads (first 5) of block 0 have ended"],
    );
}

#[test]
fn blocks_beyond_the_launch_bounds() {
    for block in [96, 1024] {
        let shape = LaunchShape { grid: 1, block, cluster: 1, team: 1, shared: 0 };
        let fault = broken_in(shape, broken_unwritten_shared, 3).unwrap_err();
        let words = format!("a block of {block} threads, but the launch bounds allow 64");
        assert!(fault.contains(&words), "{fault}");
    }
}

const TEAM: LaunchShape = LaunchShape { grid: 2, block: 32, cluster: 1, team: 2, shared: 0 };

#[test]
fn teams_that_never_meet() {
    let fault = broken_in(TEAM, broken_team, 3).unwrap_err();
    for words in [
        "broken: deadlock",
        "32 threads (first 0) of block 0 wait for their team in line",
        "of block 1 have ended",
    ] {
        assert!(fault.contains(words), "{words:?} is not in {fault:?}");
    }
    let fault = broken_in(TEAM, broken_post, 3).unwrap_err();
    assert!(
        fault.contains("32 threads (first 0) of block 1 wait for their team in line"),
        "{fault}"
    );
}

#[test]
fn accesses_that_a_gpu_would_punish() {
    caught(broken_read_outside, 1, &["read of 4 bytes outside", "thread 63", "byte 256 of data"]);
    caught(broken_write_outside, 1, &["write of 4 bytes outside", "byte -", "of data"]);
    caught(broken_alignment, 1, &["16 bytes", "no multiple of 16"]);
}

#[test]
fn shared_memory_that_nobody_wrote() {
    caught(broken_unwritten_shared, 1, &["nobody has written", "cells[9]", "thread 9"]);
    caught(broken_remote, 2, &["block 0 of the cluster, which has ended"]);
    caught(broken_rank, 2, &["block 2 in a cluster of 2"]);
    caught(broken_shared_bounds, 1, &["outside an array", "cells["]);
}

#[test]
fn bulk_copies_that_nobody_waited_for() {
    let load = "staged memory before a wait for the bulk load that fills it";
    caught(broken_unwaited_read, 1, &["read of", load]);
    // The phase before the first is over, until the first is.
    for seed in 0..9 {
        let fault = broken(broken_early_parity, 1, seed).unwrap_err();
        assert!(fault.contains(load) || fault.contains("wait for phase 1 of full[0]"), "{fault}");
    }
    caught(broken_unwaited_load, 1, &["block ended without a wait for a bulk load"]);
    for seed in 0..9 {
        let fault = broken(broken_refill_of_the_read, 1, seed).unwrap_err();
        assert!(
            fault.contains(load) || fault.contains("another thread may still access"),
            "{fault}"
        );
    }
}

/// The mistakes that row_sparse could make, whose tiles asynchronous copies bring.
#[test]
fn asynchronous_copies_that_nobody_waited_for() {
    let (nobody, other) = ("that nobody has written", "that another thread may still access");
    for (kernel, access, reasons) in [
        (broken_copy_before_its_wait as Kernel<Broken>, "read of staged memory", [nobody; 2]),
        (broken_copy_of_another, "read of staged memory", [nobody, other]),
        (broken_barrier_for_copies, "read of staged memory", [nobody; 2]),
        (broken_copy_over_the_read, "of staged memory", [nobody, other]),
        (broken_element_over_the_read, "of staged memory", [other; 2]),
    ] {
        for seed in 0..9 {
            let fault = broken(kernel, 1, seed).unwrap_err();
            let is_told = reasons.iter().any(|reason| fault.contains(reason));
            assert!(fault.contains(access) && is_told, "{fault}");
        }
    }
    caught(broken_unwaited_copy, 1, &["block ended without a wait for an asynchronous copy"]);
    caught(broken_copy_alignment, 1, &["read of 16 bytes", "no multiple of 16"]);
    caught(broken_copy_outside, 1, &["read of 16 bytes outside the buffers", "of data"]);
    caught(broken_copy_bounds, 1, &["asynchronous copy of 16 bytes outside", "byte 512 of 512"]);
}

#[test]
fn phases_that_end_too_early_or_never() {
    for seed in 0..9 {
        let fault = broken(broken_few_bytes, 1, seed).unwrap_err();
        assert!(fault.contains("128 bytes more come than full[0] expects"), "{fault}");
    }
    caught(
        broken_many_bytes,
        1,
        &["deadlock", "64 threads", "wait for phase 0 of full[0] in line"],
    );
    caught(
        broken_late_parity,
        1,
        &["deadlock", "64 threads", "wait for phase 1 of full[0] in line"],
    );
    caught(broken_arrivals, 1, &["more than 1 arrivals in a phase of full[0]"]);
    caught(broken_early_barrier, 1, &["a barrier that nobody has initialised: full[0]"]);
}

#[test]
fn bulk_copies_that_a_gpu_would_punish() {
    caught(broken_bulk_alignment, 1, &["read of 16 bytes", "no multiple of 16"]);
    caught(broken_bulk_size, 1, &["bulk load of 24 bytes"]);
    caught(broken_bulk_outside, 1, &["read of 512 bytes outside the buffers", "byte 0 of data"]);
    caught(broken_staged_bounds, 1, &["bulk load of 256 bytes outside", "byte 384 of 512"]);
    caught(broken_prefetch_size, 1, &["prefetch of 24 bytes", "no multiple of 16"]);
    caught(broken_prefetch_outside, 1, &["outside the buffers", "byte 0 of data"]);
}

/// From buffer to buffer, and in place.
#[test]
fn staged_rows_for_any_schedule() {
    const ROWS: u32 = 5;
    let numbers: Vec<u128> = (0..2 * u128::from(ROWS) * 64).map(|i| i << 64 | i << 31).collect();
    let words = |memory: &[u128]| -> Vec<u32> {
        memory.iter().flat_map(|x| [0, 32, 64, 96].map(|shift| (x >> shift) as u32)).collect()
    };
    let expected: Vec<u32> = words(&numbers).iter().map(|x| x + 1).collect();
    let bytes = 16 * numbers.len() as u64;
    let shape = LaunchShape { grid: 2, block: 64, cluster: 2, team: 1, shared: 2048 };
    for seed in 0..50 {
        let (from, mut to) = (numbers.clone(), vec![0; numbers.len()]);
        let mut buffers = [Buffer::input("from", &from), Buffer::output("to", &mut to)];
        let (from, to_address) = (from.as_ptr().cast(), to.as_mut_ptr().cast());
        let parameters = StagedRows { from, to: to_address, rows: ROWS };
        // SAFETY: the kernel's parameters are these.
        unsafe { run("rows", shape, seed, staged_rows, &parameters, &mut buffers) }.unwrap();
        let counts = buffers.map(|b| (b.read, b.written, b.accesses));
        let rows = 2 * u64::from(ROWS);
        assert_eq!(counts, [(bytes, 0, 2 * rows), (0, bytes, 64 * rows)]);
        assert_eq!(words(&to), expected, "seed {seed}");

        let mut memory = numbers.clone();
        let mut buffers = [Buffer::output("memory", &mut memory)];
        let to = memory.as_mut_ptr().cast();
        let parameters = StagedRows { from: to, to, rows: ROWS };
        // SAFETY: as above.
        unsafe { run("rows", shape, seed, staged_rows, &parameters, &mut buffers) }.unwrap();
        assert_eq!(words(&memory), expected, "in place, seed {seed}");
    }
}
