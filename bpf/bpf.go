// Package bpf holds the kernel side: BPF programs, their loaders, and the
// readers that turn their maps into numbers.
//
// The readers of processes ([Walk], [Iter]) ask, once a poll, for counters that
// the scheduler and the block layer keep anyway, so that they cost nothing
// between polls and lose nothing when the agent restarts. What the kernel keeps
// no count of is counted as it happens, by programs that are attached to it
// ([Disk], [TCX], [RunQueue], [ExitTimer]): each says what an event costs. [Life] follows processes from
// their exec to their end, by hooks that are pinned.
package bpf

//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -no-global-types -type usage -type request -type vcpu -type run Walk walk.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type slot Iter iter.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -no-global-types -type kvm_request -type kvm_usage -type kvm_layout -type kvm_run KVM kvm.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type device -type file_key -type file_set Disk disk.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type traffic -type histogram TCX tcx.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -no-global-types -type life -type shares -type exec_event -type end_event -type ask Life life.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type wait RunQueue runqueue.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type host_time Exits exits.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
