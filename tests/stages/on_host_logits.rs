//! Sessions of the library that take logits of the host.

/// Implements [`Session`](super::stages::Session) for one.
macro_rules! on_host_logits {
    ($session:ty) => {
        impl Session for $session {
            fn margins(&mut self, first: usize, teacher: &[bf16]) -> Result<()> {
                self.margins(first, logits(teacher))
            }

            fn rows(
                &mut self,
                first: usize,
                teacher: &[bf16],
                student: &[bf16],
                gradient: Option<&mut [bf16]>,
            ) -> Result<()> {
                let gradient = gradient.map(logits_mut);
                self.rows(first, logits(teacher), logits(student), gradient)
            }

            fn rows_in_place(
                &mut self,
                first: usize,
                teacher: &[bf16],
                student: &mut [bf16],
            ) -> Result<()> {
                self.rows_in_place(first, logits(teacher), logits_mut(student))
            }

            fn select(&mut self) -> Result<Vec<usize>> {
                Ok(self.select()?.to_vec())
            }

            fn repair(
                &mut self,
                tokens: &[usize],
                teacher: &[bf16],
                student: &[bf16],
                gradient: &mut [bf16],
            ) -> Result<()> {
                let (teacher, student) = (logits(teacher), logits(student));
                self.repair(tokens, teacher, student, logits_mut(gradient))
            }

            fn finish(self: Box<Self>) -> Result<Output> {
                (*self).finish()
            }
        }
    };
}
