package machine

import (
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"

	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/kvm"
)

// Limits of a Spec.
const (
	disksMax     = 16
	cpusMax      = 255
	memoryMin    = 16 << 20
	memoryMax    = 4 << 40
	sparePorts   = 4   // pcie-root-ports left empty, for hot-plug
	reconnectSec = 60  // how long QEMU keeps I/O waiting for a server that went away
	sunPathMax   = 107 // bytes of a unix socket's path, by the kernel
)

// Disk is one virtio disk, served over NBD.
type Disk struct {
	Name   string `json:"name"`   // the owner's name for it (a volume); QEMU and the guest never see it
	URI    string `json:"uri"`    // nbd+unix:///NAME?socket=/PATH or nbd://HOST:PORT/NAME
	Serial string `json:"serial"` // seen by the guest in /dev/disk/by-id; ≤ 20 bytes, may be empty
}

// Spec is everything a machine is started from.
type Spec struct {
	Name        string `json:"name"`
	CPUs        int    `json:"cpus"`
	MemoryBytes uint64 `json:"memory_bytes"`
	Disks       []Disk `json:"disks"`
	Kernel      string `json:"kernel"` // direct boot; "": boot from the first disk
	Initrd      string `json:"initrd"`
	Append      string `json:"append"`
	Dir         string `json:"-"` // the machine's files are in Dir/Name

	Accel  Accel  `json:"-"` // zero: probe /dev/kvm
	QEMU   string `json:"-"` // program; "": qemu-system-x86_64 from PATH
	Paused bool   `json:"-"` // start without running the guest (Resume does)
	// Incoming waits for the memory of a machine of the same spec elsewhere
	// (migrate.go); Land runs it then.
	Incoming bool `json:"-"`
}

// Accel is what executes the guest's instructions.
type Accel struct {
	Name string `json:"name"` // kvm or tcg
	Why  string `json:"why"`  // why not kvm
}

// String returns "kvm", or "tcg: why".
func (a Accel) String() string {
	if a.Why == "" {
		return a.Name
	}
	return a.Name + ": " + a.Why
}

// Choose is KVM where it truly works, else TCG.
func Choose(r kvm.Result) Accel {
	if r.Usable {
		return Accel{Name: "kvm"}
	}
	return Accel{Name: "tcg", Why: r.Why}
}

// goodName keeps names usable as a directory and inside QEMU's options, where
// a comma would begin the next option.
var goodName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// check refuses a spec QEMU would refuse, or would misread.
func (s *Spec) check() error {
	switch {
	case !goodName.MatchString(s.Name):
		return status.Errorf(status.Invalid, "VM name %q: want 1 to 63 letters, digits, dots, dashes or underscores, beginning with a letter or digit", s.Name)
	case s.CPUs < 1 || s.CPUs > cpusMax:
		return status.Errorf(status.Invalid, "VM %s: %d CPUs; want 1 to %d", s.Name, s.CPUs, cpusMax)
	case s.MemoryBytes < memoryMin || s.MemoryBytes > memoryMax:
		return status.Errorf(status.Invalid, "VM %s: %d bytes of memory; want 16 MiB to 4 TiB", s.Name, s.MemoryBytes)
	case len(s.Disks) > disksMax:
		return status.Errorf(status.TooBig, "VM %s: %d disks; at most %d", s.Name, len(s.Disks), disksMax)
	case s.Kernel == "" && len(s.Disks) == 0:
		return status.Errorf(status.Invalid, "VM %s has neither a disk nor a kernel to boot", s.Name)
	case s.Kernel == "" && (s.Initrd != "" || s.Append != ""):
		return status.Errorf(status.Invalid, "VM %s: an initrd or a kernel command line without a kernel", s.Name)
	case s.Accel.Name != "" && s.Accel.Name != "kvm" && s.Accel.Name != "tcg":
		return status.Errorf(status.Invalid, "VM %s: accelerator %q; want kvm or tcg", s.Name, s.Accel.Name)
	}
	for i, d := range s.Disks {
		if len(d.Serial) > 20 {
			return status.Errorf(status.Invalid, "VM %s: serial %q of disk %d is longer than 20 bytes", s.Name, d.Serial, i)
		}
		if _, err := parseURI(d.URI); err != nil {
			return err
		}
	}
	return checkSockets(s.Name, filesOf(s.Dir, s.Name))
}

func checkSockets(name string, f files) error {
	for _, sock := range []string{f.monitor, f.qmp, f.console, f.memory} {
		if len(sock) > sunPathMax {
			return status.Errorf(status.Invalid, "VM %s: the path of socket %s has %d bytes and a unix socket takes %d; use a shorter directory or VM name", name, sock, len(sock), sunPathMax)
		}
	}
	return nil
}

// server is an NBD export in QEMU's words.
type server struct {
	Type   string // unix or inet
	Path   string
	Host   string
	Port   string
	Export string
}

// network and address are what net.Dial wants.
func (s server) network() string {
	if s.Type == "unix" {
		return "unix"
	}
	return "tcp"
}

func (s server) address() string {
	if s.Type == "unix" {
		return s.Path
	}
	return net.JoinHostPort(s.Host, s.Port)
}

// parseURI reads an NBD URI. Source: doc/uri.md of the NBD protocol.
func parseURI(uri string) (server, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return server{}, status.Errorf(status.Invalid, "disk %q is no NBD URI: %w", uri, err)
	}
	export := u.Path
	if len(export) > 0 && export[0] == '/' {
		export = export[1:] // one slash belongs to the URI, further ones to the name
	}
	switch u.Scheme {
	case "nbd+unix":
		sock := u.Query().Get("socket")
		if sock == "" || len(sock) > sunPathMax {
			return server{}, status.Errorf(status.Invalid, "disk %q: want ?socket=PATH of at most %d bytes", uri, sunPathMax)
		}
		return server{Type: "unix", Path: sock, Export: export}, nil
	case "nbd":
		port := u.Port()
		if port == "" {
			port = "10809"
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || u.Hostname() == "" {
			return server{}, status.Errorf(status.Invalid, "disk %q: want nbd://HOST:PORT/NAME", uri)
		}
		return server{Type: "inet", Host: u.Hostname(), Port: port, Export: export}, nil
	case "nbds", "nbds+unix":
		return server{}, status.Errorf(status.Unsupported, "disk %q: a machine's disks are attached without TLS; use the host's own unix socket (nbd+unix)", uri)
	}
	return server{}, status.Errorf(status.Invalid, "disk %q: want nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME", uri)
}

// files are the paths of one machine.
type files struct {
	dir, record, pid, monitor, qmp, console, consoleLog, log, memory string
}

func filesOf(dir, name string) files {
	d := filepath.Join(dir, name)
	return files{
		dir:        d,
		record:     filepath.Join(d, "machine.json"),
		pid:        filepath.Join(d, "qemu.pid"),
		qmp:        filepath.Join(d, "qmp.sock"),
		monitor:    filepath.Join(d, "monitor.sock"),
		console:    filepath.Join(d, "console.sock"),
		consoleLog: filepath.Join(d, "console.log"),
		log:        filepath.Join(d, "qemu.log"),
		memory:     filepath.Join(d, "memory.sock"),
	}
}
