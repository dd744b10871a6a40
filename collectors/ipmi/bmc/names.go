package bmc

import "fmt"

// TypeName names a sensor type (§42.2, Table 42-3).
func TypeName(code byte) string {
	if int(code) < len(types) {
		return types[code]
	}
	if code >= 0xc0 {
		return "OEM"
	}
	return "Reserved"
}

// Sensor types that meters name.
const (
	TypeTemperature = 0x01
	TypeVoltage     = 0x02
	TypeCurrent     = 0x03
	TypeFan         = 0x04
)

var types = [...]string{
	"Reserved", "Temperature", "Voltage", "Current", "Fan", "Physical Security", "Platform Security", "Processor",
	"Power Supply", "Power Unit", "Cooling Device", "Other", "Memory", "Drive Slot / Bay", "POST Memory Resize", "System Firmware",
	"Event Logging Disabled", "Watchdog 1", "System Event", "Critical Interrupt", "Button", "Module / Board", "Microcontroller", "Add-in Card",
	"Chassis", "Chip Set", "Other FRU", "Cable / Interconnect", "Terminator", "System Boot", "Boot Error", "OS Boot",
	"OS Stop / Shutdown", "Slot / Connector", "System ACPI Power State", "Watchdog 2", "Platform Alert", "Entity Presence", "Monitor ASIC", "LAN",
	"Management Subsystem Health", "Battery", "Session Audit", "Version Change", "FRU State",
}

// eventStates are the states of reading types that mean the same for every
// sensor (§42.1, Table 42-2).
var eventStates = map[byte][]string{
	0x01: {
		"Lower Non-critical going low", "Lower Non-critical going high", "Lower Critical going low", "Lower Critical going high",
		"Lower Non-recoverable going low", "Lower Non-recoverable going high", "Upper Non-critical going low", "Upper Non-critical going high",
		"Upper Critical going low", "Upper Critical going high", "Upper Non-recoverable going low", "Upper Non-recoverable going high",
	},
	0x02: {"Idle", "Active", "Busy"},
	0x03: {"State Deasserted", "State Asserted"},
	0x04: {"Predictive Failure Deasserted", "Predictive Failure Asserted"},
	0x05: {"Limit Not Exceeded", "Limit Exceeded"},
	0x06: {"Performance Met", "Performance Lags"},
	0x07: {
		"OK", "Non-critical from OK", "Critical from less severe", "Non-recoverable from less severe", "Non-critical from more severe",
		"Critical from Non-recoverable", "Non-recoverable", "Monitor", "Informational",
	},
	0x08: {"Device Absent", "Device Present"},
	0x09: {"Device Disabled", "Device Enabled"},
	0x0a: {"Running", "In Test", "Power Off", "On Line", "Off Line", "Off Duty", "Degraded", "Power Save", "Install Error"},
	0x0b: {
		"Fully Redundant", "Redundancy Lost", "Redundancy Degraded", "Non-redundant, sufficient from redundant", "Non-redundant, sufficient from insufficient",
		"Non-redundant, insufficient", "Redundancy Degraded from full", "Redundancy Degraded from none",
	},
	0x0c: {"D0", "D1", "D2", "D3"},
}

// typeStates are the states of sensors that have some of their own (reading
// type 6Fh; §42.2, Table 42-3).
var typeStates = map[byte][]string{
	0x05: {"Chassis intrusion", "Drive Bay intrusion", "I/O Card area intrusion", "Processor area intrusion", "LAN leash lost", "Unauthorized dock", "FAN area intrusion"},
	0x06: {"Front Panel Lockout violation attempted", "Pre-boot password violation, user", "Pre-boot password violation, setup", "Pre-boot password violation, network boot", "Other pre-boot password violation", "Out-of-band access password violation"},
	0x07: {"IERR", "Thermal Trip", "FRB1/BIST failure", "FRB2/Hang in POST failure", "FRB3/Processor startup failure", "Configuration Error", "SM BIOS Uncorrectable CPU-complex Error", "Presence detected", "Disabled", "Terminator presence detected", "Throttled", "Uncorrectable machine check exception", "Correctable machine check error"},
	0x08: {"Presence detected", "Failure detected", "Predictive failure", "Power Supply AC lost", "AC lost or out-of-range", "AC out-of-range, but present", "Config Error", "Power Supply Inactive"},
	0x09: {"Power off/down", "Power cycle", "240VA power down", "Interlock power down", "AC lost", "Soft-power control failure", "Failure detected", "Predictive failure"},
	0x0c: {"Correctable ECC", "Uncorrectable ECC", "Parity", "Memory Scrub Failed", "Memory Device Disabled", "Correctable ECC logging limit reached", "Presence Detected", "Configuration Error", "Spare", "Throttled", "Critical Overtemperature"},
	0x0d: {"Drive Present", "Drive Fault", "Predictive Failure", "Hot Spare", "Parity Check In Progress", "In Critical Array", "In Failed Array", "Rebuild In Progress", "Rebuild Aborted"},
	0x0f: {"System Firmware Error", "System Firmware Hang", "System Firmware Progress"},
	0x10: {"Correctable memory error logging disabled", "Event logging disabled", "Log area reset/cleared", "All event logging disabled", "Log full", "Log almost full", "Correctable machine check logging disabled"},
	0x12: {"System Reconfigured", "OEM System boot event", "Undetermined system hardware failure", "Entry added to auxiliary log", "PEF Action", "Timestamp Clock Sync"},
	0x13: {"NMI/Diag Interrupt", "Bus Timeout", "I/O Channel check NMI", "Software NMI", "PCI PERR", "PCI SERR", "EISA failsafe timeout", "Bus Correctable error", "Bus Uncorrectable error", "Fatal NMI", "Bus Fatal Error", "Bus Degraded"},
	0x14: {"Power Button pressed", "Sleep Button pressed", "Reset Button pressed", "FRU Latch", "FRU Service"},
	0x19: {"Soft Power Control Failure", "Thermal Trip"},
	0x1b: {"Connected", "Config Error"},
	0x1d: {"Initiated by power up", "Initiated by hard reset", "Initiated by warm reset", "User requested PXE boot", "Automatic boot to diagnostic", "OS initiated hard reset", "OS initiated warm reset", "System Restart"},
	0x1e: {"No bootable media", "Non-bootable disk in drive", "PXE server not found", "Invalid boot sector", "Timeout waiting for selection"},
	0x1f: {"A: boot completed", "C: boot completed", "PXE boot completed", "Diagnostic boot completed", "CD-ROM boot completed", "ROM boot completed", "boot completed - device not specified", "Installation started", "Installation completed", "Installation aborted", "Installation failed"},
	0x20: {"Error during system startup", "Run-time critical stop", "OS graceful stop", "OS graceful shutdown", "PEF initiated soft shutdown", "Agent not responding"},
	0x21: {"Fault Status", "Identify Status", "Device Installed", "Ready for Device Installation", "Ready for Device Removal", "Slot Power is Off", "Device Removal Request", "Interlock", "Slot is Disabled", "Spare Device"},
	0x22: {"S0/G0: working", "S1: sleeping with system hw & processor context maintained", "S2: sleeping, processor context lost", "S3: sleeping, processor & hw context lost, memory retained", "S4: non-volatile sleep/suspend-to-disk", "S5/G2: soft-off", "S4/S5: soft-off", "G3: mechanical off", "Sleeping in S1/S2/S3 state", "G1: sleeping", "S5: entered by override", "Legacy ON state", "Legacy OFF state"},
	0x23: {"Timer expired", "Hard reset", "Power down", "Power cycle", "reserved", "reserved", "reserved", "reserved", "Timer interrupt"},
	0x24: {"Platform generated page", "Platform generated LAN alert", "Platform Event Trap generated", "Platform generated SNMP trap"},
	0x25: {"Present", "Absent", "Disabled"},
	0x27: {"Heartbeat Lost", "Heartbeat"},
	0x28: {"Sensor access degraded or unavailable", "Controller access degraded or unavailable", "Management controller off-line", "Management controller unavailable", "Sensor failure", "FRU failure"},
	0x29: {"Low", "Failed", "Presence Detected"},
	0x2a: {"Session Activated", "Session Deactivated", "Invalid Username or Password", "Invalid password disable"},
	0x2b: {"Hardware change detected", "Firmware or software change detected", "Hardware incompatibility detected", "Firmware or software incompatibility detected", "Invalid or unsupported hardware version", "Invalid or unsupported firmware version", "Hardware change success", "Firmware or software change success"},
	0x2c: {"Not Installed", "Inactive", "Activation Requested", "Activation in Progress", "Active", "Deactivation Requested", "Deactivation in Progress", "Communication lost"},
}

// ownStates is the reading type of sensors with states of their own.
const ownStates = 0x6f

// StateName names a state of a sensor by its offset.
func StateName(sensorType, eventType byte, offset int) string {
	list := eventStates[eventType]
	if eventType == ownStates {
		list = typeStates[sensorType]
	}
	if offset < len(list) {
		return list[offset]
	}
	return fmt.Sprintf("state %d", offset)
}

// StateNames names the states that a discrete sensor is in.
func StateNames(s *Sensor, states uint16) []string {
	var names []string
	for i := range 15 {
		if states&(1<<i) != 0 {
			names = append(names, StateName(s.Type, s.EventType, i))
		}
	}
	return names
}

// State says what an event of a sensor is about.
func (e *Event) State() string {
	if e.OEM != nil {
		return fmt.Sprintf("OEM % x", e.OEM)
	}
	return StateName(e.Kind, e.EventType, e.Offset())
}
