//! The ATKD loss from C: `include/atkd.h`, generated from this crate by `tests/header.rs`.
//!
//! Every function can be called from any thread. None lets a panic out.
#![expect(
    rustdoc::broken_intra_doc_links,
    reason = "the comments are for C, and brackets are shapes"
)]

mod settings;
mod status;
mod types;
mod workspace;

use std::ffi::{c_char, c_void};

use atkd::Objective;
use atkd::call::{RawCall, RawStage};

use settings::objective;
pub use settings::*;
pub use status::*;
use status::{Failure, guard};
pub use types::*;
use workspace::Place;

/// The version that a program was compiled against; compare it with atkd_abi_version().
pub const ATKD_ABI_VERSION: u32 = 4;

/// The version of the layouts that ranks exchange, AtkdRowState and AtkdSweepTerms.
pub const ATKD_ROW_STATE_VERSION: u32 = 1;

/// Threads that a workspace for host memory has at most: to start them takes time that grows with their square.
pub const ATKD_MAX_THREADS: usize = 1024;

/// A loss over tokens. Never changes: any number of threads may use one at once.
pub struct AtkdObjective(Objective);

/// A place where calls run. Any number of threads may use one at once.
pub struct AtkdWorkspace(Place);

/// ATKD_ABI_VERSION of the library that is loaded. Other numbers mean another layout of the structs.
#[unsafe(no_mangle)]
pub extern "C" fn atkd_abi_version() -> u32 {
    ATKD_ABI_VERSION
}

/// The error of this thread's last call that did not return ATKD_OK, with the numbers that
/// explain it; empty if there was none. Valid until this thread's next failing call.
#[unsafe(no_mangle)]
pub extern "C" fn atkd_error_message() -> *const c_char {
    status::last_message()
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn atkd_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The paper's ATKD: lambda 0.2, hard ratio 0.5, temperature 1, labels as targets, ignore index -100,
/// the mean over valid tokens, no cross entropy.
#[unsafe(no_mangle)]
pub extern "C" fn atkd_default_settings() -> AtkdSettings {
    AtkdSettings::default()
}

/// Checks the settings and makes an objective of them, to be destroyed by atkd_objective_destroy. On an error
/// *objective is null.
///
/// # Safety
/// `settings` is null or points to settings, `objective` is null or has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_objective_create(
    settings: *const AtkdSettings,
    objective: *mut *mut AtkdObjective,
) -> AtkdStatus {
    // SAFETY: the caller's.
    unsafe {
        put(objective, "objective", || {
            let settings = settings.as_ref().ok_or(Failure::null("settings"))?;
            Ok(AtkdObjective(self::objective(settings)?))
        })
    }
}

/// Null is nothing to destroy.
///
/// # Safety
/// `objective` is null, or from atkd_objective_create and not yet destroyed, and no call uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_objective_destroy(objective: *mut AtkdObjective) {
    // SAFETY: the caller's.
    unsafe { destroy(objective) }
}

/// A workspace for host memory, to be destroyed by atkd_workspace_destroy. A call is worked on by
/// `threads` threads, at most ATKD_MAX_THREADS: the one that makes it, and others that the workspace's calls
/// share. If `threads` is 0, by one a core, and all of the process shares the others. No call waits for a thread
/// that is busy with something else. On an error *workspace is null.
///
/// In the child of a fork a workspace for host memory can be used as in its parent, whatever the parent's
/// threads were doing: atkd starts other threads there.
///
/// # Safety
/// `workspace` is null or has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_workspace_create(
    threads: usize,
    workspace: *mut *mut AtkdWorkspace,
) -> AtkdStatus {
    // SAFETY: the caller's.
    unsafe { put(workspace, "workspace", || Ok(AtkdWorkspace(Place::host(threads)?))) }
}

/// A workspace for the memory of a CUDA device, in its primary context, to be destroyed by
/// atkd_workspace_destroy once its calls are done. Calls may have up to `max_tokens` tokens, in up to as
/// many sequences; they are put on a stream and not waited for. Calls that share a workspace must run one
/// after the other: on one stream, or on streams that wait for each other.
///
/// A label that names no token of the vocabulary is met by a kernel, which drops its token; the
/// loss that the call leaves is NaN, and so are those of later calls until atkd_workspace_synchronize has
/// returned the error.
///
/// On an error of this function *workspace is null.
///
/// # Safety
/// `workspace` is null or has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_workspace_create_cuda(
    device: i32,
    max_tokens: usize,
    workspace: *mut *mut AtkdWorkspace,
) -> AtkdStatus {
    // SAFETY: the caller's.
    unsafe { put(workspace, "workspace", || Ok(AtkdWorkspace(Place::cuda(device, max_tokens)?))) }
}

/// Waits for what is on the CUstream, and returns the error of a kernel, if there was one since the last
/// time, or that the last call failed on its way and left no results. Nothing to wait for in host memory.
///
/// # Safety
/// `workspace` is null or a workspace, `stream` is null or a stream of its device, on which the last call
/// was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_workspace_synchronize(
    workspace: *mut AtkdWorkspace,
    stream: *mut c_void,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's; shared, since other threads may be in a call with it.
        let workspace = unsafe { workspace.as_ref() }.ok_or(Failure::null("workspace"))?;
        // SAFETY: the caller's.
        unsafe { workspace.0.synchronize(stream) }
    })
}

/// Null is nothing to destroy.
///
/// # Safety
/// `workspace` is null, or from a function above and not yet destroyed, and no call uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_workspace_destroy(workspace: *mut AtkdWorkspace) {
    // SAFETY: the caller's.
    unsafe { destroy(workspace) }
}

/// The loss and each token's terms, without a gradient: call->gradient.data must be null.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_forward(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: *const AtkdCall,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let call = unsafe { call.as_ref() }.ok_or(Failure::null("call"))?;
        check_no_gradient(call, ["atkd_forward", "atkd_forward_backward"])?;
        // SAFETY: the caller's.
        unsafe { run(objective, workspace, call, false) }
    })
}

/// The loss, each token's terms, and the gradient with respect to the student's logits. It goes to
/// call->gradient, of the student's dtype or float32, or of any dtype if the student's is float32, and over the
/// student's logits if that names the very same matrix. On an error that is not ATKD_PANIC nothing was written.
///
/// # Safety
/// Each pointer is null or valid for what it is described to hold; until the call returns nobody else
/// writes to what it reads, nor touches what it writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_forward_backward(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: *const AtkdCall,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let call = unsafe { call.as_ref() }.ok_or(Failure::null("call"))?;
        // SAFETY: the caller's.
        unsafe { run(objective, workspace, call, true) }
    })
}

/// The loss and each token's terms with a sparse teacher, without a gradient: call->teacher.data and call->gradient.data
/// must be null. The margins, for atkd_select_hard, are call->margin. A CUDA workspace has no ATKD_TAIL_UNIFORM, and returns
/// ATKD_NOT_SUPPORTED; its kernels find a teacher's values that are no distribution, as they do wrong labels: see
/// atkd_workspace_create_cuda.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_sparse_forward(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: *const AtkdCall,
    teacher: *const AtkdSparseTeacher,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let call = unsafe { call.as_ref() }.ok_or(Failure::null("call"))?;
        check_no_gradient(call, ["atkd_sparse_forward", "atkd_sparse_forward_backward"])?;
        // SAFETY: the caller's.
        unsafe { run_sparse(objective, workspace, call, teacher, false) }
    })
}

/// The loss and each token's terms as atkd_sparse_forward has them, and the gradient as atkd_forward_backward writes it.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_sparse_forward_backward(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: *const AtkdCall,
    teacher: *const AtkdSparseTeacher,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let call = unsafe { call.as_ref() }.ok_or(Failure::null("call"))?;
        // SAFETY: the caller's.
        unsafe { run_sparse(objective, workspace, call, teacher, true) }
    })
}

/// The teacher's margins alone, to call->margin. Of the call, tokens, vocab, teacher, labels, temperatures and stream are
/// read, and nothing else; of the objective its temperature, target and ignore index. On a device a token whose label is out
/// of range gets NaN, beside the error of atkd_workspace_synchronize, and so does one whose temperature is.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_teacher_margins(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: *const AtkdCall,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let (call, objective, workspace) =
            unsafe { (call.as_ref(), objective.as_ref(), workspace.as_ref()) };
        let call = call.ok_or(Failure::null("call"))?;
        let objective = objective.ok_or(Failure::null("objective"))?;
        let workspace = workspace.ok_or(Failure::null("workspace"))?;
        let teacher = call.parse_teacher()?;
        if call.margin.is_null() && call.tokens > 0 {
            return Err(Failure::null("margin"));
        }
        let to = call.margin as u64;
        // SAFETY: the caller's.
        unsafe { workspace.0.teacher_margins(&objective.0, &teacher, to, call.stream) }
    })
}

/// The entropy of one model's distribution for each token, to entropies->entropies: for selections and weights by how sure
/// a model is. The workspace says where.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_token_entropies(
    workspace: *mut AtkdWorkspace,
    entropies: *const AtkdEntropies,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let (entropies, workspace) = unsafe { (entropies.as_ref(), workspace.as_ref()) };
        let entropies = entropies.ok_or(Failure::null("entropies"))?;
        let workspace = workspace.ok_or(Failure::null("workspace"))?;
        // SAFETY: the caller's.
        unsafe { workspace.0.token_entropies(&entropies.parse()?, entropies.stream) }
    })
}

/// Selects hard tokens by their margins, exactly as a call over all of these tokens would. On a device, sequences whose
/// offsets are out of order get no hard tokens, beside the error of atkd_workspace_synchronize.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_select_hard(
    workspace: *mut AtkdWorkspace,
    selection: *const AtkdSelection,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's.
        let (selection, workspace) = unsafe { (selection.as_ref(), workspace.as_ref()) };
        let selection = selection.ok_or(Failure::null("selection"))?;
        let workspace = workspace.ok_or(Failure::null("workspace"))?;
        let AtkdSelection { hard_ratio, stream, .. } = *selection;
        // SAFETY: the caller's.
        unsafe { workspace.0.select_hard(&selection.parse()?, hard_ratio, stream) }
    })
}

/// The states of the shard's part of each row, to `states`, [tokens]. A call on a shard of the vocabulary is: this; an exchange
/// by the caller, to shard->states, the same on every rank; atkd_shard_margins and atkd_select_hard, over the tokens of all
/// ranks if they are split, too; for a divergence of two sweeps atkd_shard_terms and a second exchange;
/// atkd_shard_forward and atkd_shard_gradient. By ATKD_TARGET_TEACHER each rank leaves out its own arg max.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_shard_states(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
    states: *mut AtkdRowState,
) -> AtkdStatus {
    // SAFETY: the caller's.
    unsafe {
        run_shard(objective, workspace, shard, false, |_, _| Ok(RawStage::States(states as u64)))
    }
}

/// The teacher's margins, to `margins`, [tokens], from the states of all ranks: the same bits on each.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_shard_margins(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
    margins: *mut f32,
) -> AtkdStatus {
    let stage =
        |shard: &AtkdShard, _: &AtkdCall| Ok(RawStage::Margins(shard.exchanged()?, margins as u64));
    // SAFETY: the caller's.
    unsafe { run_shard(objective, workspace, shard, false, stage) }
}

/// The terms of the second sweep over the shard's part of each row, to `terms`, [tokens]. It is an error for a divergence of
/// one sweep.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_shard_terms(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
    terms: *mut AtkdSweepTerms,
) -> AtkdStatus {
    let stage =
        |shard: &AtkdShard, _: &AtkdCall| Ok(RawStage::Terms(shard.exchanged()?, terms as u64));
    // SAFETY: the caller's.
    unsafe { run_shard(objective, workspace, shard, false, stage) }
}

/// The gradient of the shard's columns, to the call's gradient; over the student's logits if it is the same.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_shard_gradient(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
) -> AtkdStatus {
    let stage = |shard: &AtkdShard, call: &AtkdCall| {
        let RawCall { gradient, gradient_padding, .. } = call.parse(true)?;
        let gradient = gradient.ok_or(Failure::null("gradient"))?;
        Ok(RawStage::Gradient(shard.exchanged()?, gradient, gradient_padding))
    };
    // SAFETY: the caller's.
    unsafe { run_shard(objective, workspace, shard, true, stage) }
}

/// The loss of the tokens and the terms of each, to the call's outputs: the same bits on every rank of the vocabulary. With
/// counts, the losses of the ranks of tokens add up.
///
/// # Safety
/// The contract of atkd_forward_backward holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn atkd_shard_forward(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
) -> AtkdStatus {
    let stage = |shard: &AtkdShard, call: &AtkdCall| {
        Ok(RawStage::Finish(shard.exchanged()?, call.output()))
    };
    // SAFETY: the caller's.
    unsafe { run_shard(objective, workspace, shard, false, stage) }
}

/// # Safety
/// The contract of [`atkd_forward_backward`] holds.
unsafe fn run_shard(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    shard: *const AtkdShard,
    with_gradient: bool,
    stage: impl Fn(&AtkdShard, &AtkdCall) -> Result<RawStage, Failure>,
) -> AtkdStatus {
    guard(|| {
        // SAFETY: the caller's; shared, since other threads may be in a call with the workspace.
        let (objective, workspace, shard) =
            unsafe { (objective.as_ref(), workspace.as_ref(), shard.as_ref()) };
        let objective = objective.ok_or(Failure::null("objective"))?;
        let workspace = workspace.ok_or(Failure::null("workspace"))?;
        let shard = shard.ok_or(Failure::null("shard"))?;
        // SAFETY: the caller's.
        unsafe {
            let (raw, call) = shard.parse(with_gradient)?;
            workspace.0.run_shard(&objective.0, &raw, &stage(shard, &call)?, call.stream)
        }
    })
}

/// Checks that a call that writes no gradient is given no place for one.
fn check_no_gradient(
    call: &AtkdCall,
    [function, with_gradient]: [&'static str; 2],
) -> Result<(), Failure> {
    if call.gradient.data.is_null() {
        return Ok(());
    }
    Err(Failure::new(
        ATKD_INVALID_ARGUMENT,
        format!(
            "gradient.data is {:p}, but {function} writes no gradient; set it to null, or use {with_gradient}",
            call.gradient.data
        ),
    ))
}

/// # Safety
/// The contract of [`atkd_forward_backward`] holds.
unsafe fn run_sparse(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: &AtkdCall,
    teacher: *const AtkdSparseTeacher,
    with_gradient: bool,
) -> Result<(), Failure> {
    // SAFETY: the caller's; shared, since other threads may be in a call with the workspace.
    let (objective, workspace, teacher) =
        unsafe { (objective.as_ref(), workspace.as_ref(), teacher.as_ref()) };
    let objective = objective.ok_or(Failure::null("objective"))?;
    let workspace = workspace.ok_or(Failure::null("workspace"))?;
    let teacher = teacher.ok_or(Failure::null("teacher"))?;
    let of_teacher = teacher.parse(call, with_gradient)?;
    // SAFETY: the caller's.
    unsafe { workspace.0.run_sparse(&objective.0, &of_teacher, &call.output(), call.stream) }
}

/// # Safety
/// The contract of [`atkd_forward_backward`] holds.
unsafe fn run(
    objective: *const AtkdObjective,
    workspace: *mut AtkdWorkspace,
    call: &AtkdCall,
    with_gradient: bool,
) -> Result<(), Failure> {
    // SAFETY: the caller's.
    let objective = unsafe { objective.as_ref() }.ok_or(Failure::null("objective"))?;
    // SAFETY: the caller's; shared, since other threads may be in a call with it.
    let workspace = unsafe { workspace.as_ref() }.ok_or(Failure::null("workspace"))?;
    // SAFETY: the caller's.
    unsafe {
        workspace.0.run(&objective.0, &call.parse(with_gradient)?, &call.output(), call.stream)
    }
}

/// Leaves a handle of what is made at `to`, or null.
///
/// # Safety
/// `to` is null or has room for a pointer.
unsafe fn put<T>(
    to: *mut *mut T,
    name: &'static str,
    make: impl FnOnce() -> Result<T, Failure>,
) -> AtkdStatus {
    guard(|| {
        if to.is_null() {
            return Err(Failure::null(name));
        }
        // SAFETY: the caller's.
        unsafe { to.write(std::ptr::null_mut()) };
        let handle = Box::into_raw(Box::new(make()?));
        // SAFETY: the caller's.
        unsafe { to.write(handle) };
        Ok(())
    })
}

/// # Safety
/// `handle` is null or from [`put`], not yet destroyed and not in use.
unsafe fn destroy<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: the caller's.
        drop(unsafe { Box::from_raw(handle) });
    }
}
