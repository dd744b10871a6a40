// Package bpf holds the kernel side: BPF programs, their loaders, and the
// readers that turn their maps into numbers.
//
// Nothing here hooks into the kernel. The readers ask, once a poll, for
// counters that the scheduler and the block layer keep anyway, so that they
// cost nothing between polls and lose nothing when the agent restarts.
package bpf

//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type usage -type request Walk walk.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
//go:generate go tool -modfile=../tools/go.mod bpf2go -go-package gen -output-dir ../gen -target bpfel -type slot Iter iter.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -Iinclude
