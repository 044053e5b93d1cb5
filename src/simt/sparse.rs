//! A call with a sparse teacher, through the CUDA kernels.

use super::machine::Buffer;
use super::{Inputs, Simulation, Traffic, address, input, labels, raw_labels};
use crate::call::{RawLogits, RawOutput, RawSparseCall, RawSparseTeacher};
use crate::device::sparse::launches;
use crate::device::workspace::{Layout, Memory};
use crate::sparse::SparseTeacher;
use crate::{Objective, Output, Result};

impl Simulation {
    /// The call of a batch with this teacher.
    pub(super) fn sparse_call(
        self,
        objective: &Objective,
        inputs: Inputs,
        teacher: &SparseTeacher,
        student: RawLogits,
        gradient: Option<RawLogits>,
        mut buffers: Vec<Buffer>,
    ) -> Result<(Output, Traffic)> {
        buffers.extend(inputs.buffers());
        let (indices, log_probs, target_log_probs) = teacher.values();
        buffers.push(Buffer { name: "indices", ..labels(indices) });
        buffers.push(input("log-probabilities", log_probs));
        buffers.extend(target_log_probs.map(|own| Buffer::input("target log-probabilities", own)));
        let call = RawSparseCall {
            tokens: inputs.tokens,
            teacher: RawSparseTeacher {
                top_k: teacher.top_k(),
                indices: raw_labels(indices),
                log_probs: log_probs.as_ptr() as u64,
                dtype: log_probs.dtype(),
                target_log_probs: target_log_probs.map(address),
                target_rounding: teacher.target_rounding(),
                tail: teacher.tail(),
            },
            student,
            gradient,
            gradient_padding: 0,
        };
        let layout = Layout { capacity: call.tokens.tokens };
        let workspace = self.workspace(layout, &mut buffers);
        let memory = Memory::new(layout, address(&workspace));
        let output = RawOutput::default();
        let mut traffic = Vec::new();
        for launch in launches(objective, &call, &output, &self.device, memory)? {
            let mut buffers = buffers.clone();
            self.launch(&launch, &mut buffers)?;
            traffic.push((launch.kernel, buffers));
        }
        // SAFETY: so many bytes are there, all of them written.
        let bytes =
            unsafe { std::slice::from_raw_parts(workspace.as_ptr().cast::<u8>(), layout.bytes()) };
        Ok((layout.read(bytes, call.tokens.tokens, call.tokens.vocab, objective)?, traffic))
    }
}
