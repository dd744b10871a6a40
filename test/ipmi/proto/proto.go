// Package proto is what a guest with an IPMI device and its tests say to each
// other.
package proto

import "time"

// ReadFile as a command's first argument returns the content of the file that
// the second names.
const ReadFile = "@file"

// Command is a program to run in the guest. One without arguments ends the guest.
type Command struct {
	Args []string
	UID  uint32 // whose process it is; 0: root's
	Env  []string
}

// Result is what a program said.
type Result struct {
	Out, Err string
	Data     []byte
	Code     int
	Took     time.Duration
}
