//go:build manual

package main

import "github.com/kvmeter/kvmeter/cmd/internal/manual"

func main() { manual.Write(command()) }
