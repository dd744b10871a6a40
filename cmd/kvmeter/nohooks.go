//go:build !testhooks

package main

import "github.com/spf13/cobra"

// withTestHooks adds nothing: only a build with the tag testhooks has hooks.
func withTestHooks(*cobra.Command) {}
