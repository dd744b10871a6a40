//go:build !manual

package main

import (
	"context"
	"fmt"
	"os"

	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
)

func main() {
	ctx, stop := daemon.Context(context.Background())
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}
