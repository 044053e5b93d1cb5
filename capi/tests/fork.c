/* Calls in the child of a fork, while other threads of the parent are in calls; tests/c.rs compiles, links and
   runs it. */
#undef NDEBUG
#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "atkd.h"

enum { TOKENS = 64, VOCAB = 1000, FORKS = 100 };

static float teacher[TOKENS * VOCAB], student[TOKENS * VOCAB];
static int64_t labels[TOKENS];
static AtkdObjective *objective;
static AtkdWorkspace *workspace;
static atomic_int stop;

static float loss_by(AtkdWorkspace *with, float *gradient) {
    float loss = -1;
    AtkdCall call = {0};
    call.tokens = TOKENS;
    call.vocab = VOCAB;
    call.teacher = (AtkdMatrix){.data = teacher, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.student = (AtkdMatrix){.data = student, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.gradient = (AtkdMatrix){.data = gradient, .row_stride = VOCAB, .dtype = ATKD_F32};
    call.labels = (AtkdLabels){.data = labels, .dtype = ATKD_I64};
    call.loss = &loss;
    if (atkd_forward_backward(objective, with, &call) != ATKD_OK) {
        fprintf(stderr, "%s\n", atkd_error_message());
        return -1;
    }
    return loss;
}

static void *call_until_stopped(void *gradient) {
    while (!stop) {
        loss_by(workspace, gradient);
    }
    return NULL;
}

/* Whether a child has these results, with its parent's workspace and with its own, before its alarm. */
static int holds_in_child(float loss, const float *expected) {
    pid_t child = fork();
    assert(child >= 0);
    if (child == 0) {
        static float gradient[TOKENS * VOCAB];
        alarm(20);
        int same = loss_by(workspace, gradient) == loss && memcmp(gradient, expected, sizeof gradient) == 0;
        AtkdWorkspace *own;
        same = same && atkd_workspace_create(2, &own) == ATKD_OK && loss_by(own, gradient) == loss;
        atkd_workspace_destroy(own);
        atkd_workspace_destroy(workspace);
        _exit(same ? 0 : 1);
    }
    int status;
    assert(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(void) {
    for (int i = 0; i < TOKENS * VOCAB; i++) {
        teacher[i] = (float)(i * 7919 % 1009) / 200;
        student[i] = (float)(i * 6007 % 1013) / 200;
    }
    for (int i = 0; i < TOKENS; i++) {
        labels[i] = i;
    }
    AtkdSettings settings = atkd_default_settings();
    assert(atkd_objective_create(&settings, &objective) == ATKD_OK);
    size_t threads[] = {0, 1, 2};
    for (int t = 0; t < 3; t++) {
        static float expected[TOKENS * VOCAB], others[2][TOKENS * VOCAB];
        assert(atkd_workspace_create(threads[t], &workspace) == ATKD_OK);
        float loss = loss_by(workspace, expected);
        assert(loss > 0 && holds_in_child(loss, expected));
        stop = 0;
        pthread_t callers[2];
        for (int i = 0; i < 2; i++) {
            assert(pthread_create(&callers[i], NULL, call_until_stopped, others[i]) == 0);
        }
        for (int i = 0; i < FORKS; i++) {
            assert(holds_in_child(loss, expected));
        }
        stop = 1;
        for (int i = 0; i < 2; i++) {
            pthread_join(callers[i], NULL);
        }
        atkd_workspace_destroy(workspace);
    }
    atkd_objective_destroy(objective);
    puts("all passed");
    return 0;
}
