package machine

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// object is a JSON object for QEMU. Objects, unlike QEMU's comma-separated
// options, need no quoting rule of its own for paths and names.
type object map[string]any

// sandboxArg denies QEMU the system calls it does not need. It is left out
// where the kernel has no seccomp (start tries again without).
const sandboxArg = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// rawNode and nbdNode are the two block nodes under each disk: a raw node,
// which can take a new size, over an NBD node, which cannot. Both have a
// generation: the guest's device moves to the next one when the disk grows or
// its connection is dead.
func rawNode(disk, gen int) string   { return rawPrefix(disk) + strconv.Itoa(gen) }
func nbdNode(disk, gen int) string   { return nbdPrefix(disk) + strconv.Itoa(gen) }
func rawPrefix(disk int) string      { return fmt.Sprintf("disk%d-raw", disk) }
func nbdPrefix(disk int) string      { return fmt.Sprintf("disk%d-nbd", disk) }
func nodeCache() object              { return object{"direct": true, "no-flush": false} }
func qdevOf(disk int) string         { return fmt.Sprintf("vd%d", disk) }
func chardevPath(path string) string { return strings.ReplaceAll(path, ",", ",,") }
func (s server) object() object {
	if s.Type == "unix" {
		return object{"type": "unix", "path": s.Path}
	}
	return object{"type": "inet", "host": s.Host, "port": s.Port}
}

// nbdBlockdev is an NBD node over an export. openSec bounds its opening, with
// attempts repeated for so long; 0 is one attempt of any length.
func nbdBlockdev(node string, s server, openSec int) object {
	return object{
		"driver": "nbd", "node-name": node, "server": s.object(), "export": s.Export,
		"open-timeout": openSec, "reconnect-delay": reconnectSec, "discard": "unmap", "cache": nodeCache(),
	}
}

// rawBlockdev is the node the guest's device sits on.
func rawBlockdev(node, below string) object {
	return object{
		"driver": "raw", "node-name": node, "file": below,
		"discard": "unmap", "detect-zeroes": "off", "cache": nodeCache(),
	}
}

// argv is QEMU's command line for a checked spec, without the program's name.
func argv(s *Spec, f files, accel Accel, sandbox bool) ([]string, error) {
	args := []string{
		"-name", "guest=" + s.Name + ",debug-threads=on",
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
		"-machine", "q35", "-accel", accelArg(accel), "-cpu", "max",
		"-smp", strconv.Itoa(s.CPUs), "-m", memoryArg(s.MemoryBytes, accel),
		"-pidfile", f.pid,
		"-chardev", socketChardev("console", f.console) + ",logfile=" + chardevPath(f.consoleLog) + ",logappend=on",
		"-serial", "chardev:console",
	}
	// Two monitors, as each serves one program at a time: ours, and one for
	// people and other tools.
	for _, m := range [][2]string{{"monitor", f.monitor}, {"qmp", f.qmp}} {
		args = append(args, "-chardev", socketChardev(m[0], m[1]), "-mon", "mode=control,chardev="+m[0])
	}
	if sandbox {
		args = append(args, "-sandbox", sandboxArg)
	}
	if s.Paused || s.Incoming {
		args = append(args, "-S")
	}
	if s.Incoming {
		args = append(args, "-incoming", "defer")
	}
	for i := range sparePorts {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=spare%d,chassis=%d", i, i+1))
	}
	for i, d := range s.Disks {
		disk, err := diskArgs(i, d, s.Kernel == "")
		if err != nil {
			return nil, err
		}
		args = append(args, disk...)
	}
	return append(args, bootArgs(s)...), nil
}

func accelArg(a Accel) string {
	if a.Name == "tcg" {
		return "tcg,thread=multi"
	}
	return a.Name
}

// memoryArg gives an emulated guest 8 KiB more than a multiple of 256 KiB. Of memory
// of whole multiples QEMU collects what the guest has changed 64 pages at a time, and
// before 9.0 that way did not tell the emulated processors (cpu_physical_memory_sync_dirty_bitmap
// in include/exec/ram_addr.h; its commit 03bfc2188f061a mends it): what they changed
// later was not sent, and a guest that had moved live crashed. TestMemoryArrivesWhole.
func memoryArg(bytes uint64, a Accel) string {
	const words, least = 256 << 10, 8 << 10 // QEMU rounds up to these 8 KiB
	if a.Name == "tcg" && (bytes+least-1)/least*least%words == 0 {
		bytes += least
	}
	return fmt.Sprintf("size=%dk", bytes>>10)
}

func socketChardev(id, path string) string {
	return "socket,id=" + id + ",path=" + chardevPath(path) + ",server=on,wait=off"
}

// diskArgs are the two nodes and the device of one disk. On an I/O error the
// guest stops, with the request kept: it sees no error, and Machine lets it go
// on when the disk is back.
func diskArgs(i int, d Disk, boot bool) ([]string, error) {
	s, err := parseURI(d.URI)
	if err != nil {
		return nil, err
	}
	device := object{
		"driver": "virtio-blk-pci", "id": qdevOf(i), "drive": rawNode(i, 0),
		"werror": "stop", "rerror": "stop", "write-cache": "on", "discard": true,
	}
	if d.Serial != "" {
		device["serial"] = d.Serial
	}
	if boot {
		device["bootindex"] = i
	}
	var args []string
	for _, o := range []struct {
		flag string
		obj  object
	}{
		{"-blockdev", nbdBlockdev(nbdNode(i, 0), s, 0)},
		{"-blockdev", rawBlockdev(rawNode(i, 0), nbdNode(i, 0))},
		{"-device", device},
	} {
		text, err := json.Marshal(o.obj)
		if err != nil {
			return nil, status.Errorf(status.Internal, "QEMU options of disk %d: %w", i, err)
		}
		args = append(args, o.flag, string(text))
	}
	return args, nil
}

func bootArgs(s *Spec) []string {
	if s.Kernel == "" {
		return nil
	}
	args := []string{"-kernel", s.Kernel}
	if s.Initrd != "" {
		args = append(args, "-initrd", s.Initrd)
	}
	if s.Append != "" {
		args = append(args, "-append", s.Append)
	}
	return args
}
