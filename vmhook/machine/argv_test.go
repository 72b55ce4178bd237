package machine

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestArgv compares whole command lines with testdata/*.golden, one argument
// a line.
func TestArgv(t *testing.T) {
	direct := Spec{
		Name: "db-1", CPUs: 2, MemoryBytes: 160 << 20, Dir: "/c/host-1/vm",
		Kernel: "/k/vmlinuz", Initrd: "/k/initrd", Append: "console=ttyS0 quiet",
		Disks: []Disk{
			{Name: "data", URI: "nbd+unix:///data?socket=/c/host-1/nbd.sock", Serial: "data"},
			{Name: "log", URI: "nbd://[::1]:10810/log%20two"},
		},
	}
	disk := Spec{
		Name: "app", CPUs: 1, MemoryBytes: 1 << 30, Dir: "/c/a,b/vm", Paused: true,
		Disks: []Disk{{Name: "boot", URI: "nbd+unix:///boot?socket=/c/a,b/nbd.sock"}},
	}
	for _, c := range []struct {
		golden  string
		spec    Spec
		accel   Accel
		sandbox bool
	}{
		{"direct-tcg", direct, Accel{Name: "tcg", Why: "no /dev/kvm"}, true},
		{"disk-kvm", disk, Accel{Name: "kvm"}, false},
	} {
		if err := c.spec.check(); err != nil {
			t.Errorf("%s: %v", c.golden, err)
		}
		args, err := argv(&c.spec, filesOf(c.spec.Dir, c.spec.Name), c.accel, c.sandbox)
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(args, "\n") + "\n"
		file := "testdata/" + c.golden + ".golden"
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s differs (-update rewrites it):\n%s", c.golden, got)
		}
	}
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]server{
		"nbd+unix:///v?socket=/run/n.sock":   {Type: "unix", Path: "/run/n.sock", Export: "v"},
		"nbd+unix:////v?socket=/s":           {Type: "unix", Path: "/s", Export: "/v"},
		"nbd+unix:///?socket=/a%20b":         {Type: "unix", Path: "/a b"},
		"nbd://h:1/x":                        {Type: "inet", Host: "h", Port: "1", Export: "x"},
		"nbd://10.0.0.1/x":                   {Type: "inet", Host: "10.0.0.1", Port: "10809", Export: "x"},
		"nbd://[fe80::1]:7/a%2Fb":            {Type: "inet", Host: "fe80::1", Port: "7", Export: "a/b"},
		"nbd+unix:///v?socket=/a,b&x=ignore": {Type: "unix", Path: "/a,b", Export: "v"},
	} {
		got, err := parseURI(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", uri, got, err, want)
		}
	}
	for uri, kind := range map[string]status.Kind{
		"":                         status.Invalid,
		"disk.raw":                 status.Invalid,
		"http://h/x":               status.Invalid,
		"nbd+unix:///v":            status.Invalid,
		"nbd:///v":                 status.Invalid,
		"nbd://h:0/v":              status.Invalid,
		"nbd://h:99999/v":          status.Invalid,
		"nbd://h:x/v":              status.Invalid,
		"nbd+unix:///%zz":          status.Invalid,
		"nbds://h/v":               status.Unsupported,
		"nbds+unix:///v?socket=/s": status.Unsupported,
		"nbd+unix:///v?socket=/" + strings.Repeat("x", sunPathMax): status.Invalid,
	} {
		if got, err := parseURI(uri); !errors.Is(err, kind) {
			t.Errorf("%q: %+v, %v; want %v", uri, got, err, kind)
		}
	}
}

// TestCheck breaks a good spec in one way at a time.
func TestCheck(t *testing.T) {
	good := Spec{Name: "a", CPUs: 1, MemoryBytes: 64 << 20, Dir: "/d", Disks: []Disk{{URI: "nbd://h/v"}}}
	if err := good.check(); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Spec){
		"no name":          func(s *Spec) { s.Name = "" },
		"name with comma":  func(s *Spec) { s.Name = "a,b" },
		"name with slash":  func(s *Spec) { s.Name = "a/b" },
		"name of dots":     func(s *Spec) { s.Name = ".." },
		"long name":        func(s *Spec) { s.Name = strings.Repeat("a", 64) },
		"no cpu":           func(s *Spec) { s.CPUs = 0 },
		"many cpus":        func(s *Spec) { s.CPUs = 256 },
		"no memory":        func(s *Spec) { s.MemoryBytes = 0 },
		"endless memory":   func(s *Spec) { s.MemoryBytes = 1 << 63 },
		"nothing to boot":  func(s *Spec) { s.Disks = nil },
		"initrd only":      func(s *Spec) { s.Initrd = "/i" },
		"append only":      func(s *Spec) { s.Append = "x" },
		"accelerator":      func(s *Spec) { s.Accel.Name = "xen,evil" },
		"long serial":      func(s *Spec) { s.Disks[0].Serial = strings.Repeat("s", 21) },
		"bad uri":          func(s *Spec) { s.Disks[0].URI = "x" },
		"too many disks":   func(s *Spec) { s.Disks = make([]Disk, disksMax+1) },
		"long socket path": func(s *Spec) { s.Dir = "/" + strings.Repeat("d", sunPathMax) },
	} {
		s := good
		s.Disks = append([]Disk(nil), good.Disks...)
		change(&s)
		if err := s.check(); err == nil || status.Of(err) == status.Internal {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestParseStat(t *testing.T) {
	line := func(name, state string) []byte {
		return []byte("7 (" + name + ") " + state + " 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0\n")
	}
	for _, c := range []struct {
		name, state string
		want        uint64
	}{
		{"qemu", "S", 4242}, {"a b) R 1 (x", "R", 4242}, {"gone", "Z", 0}, {"gone", "X", 0},
	} {
		if got, err := parseStat(line(c.name, c.state)); err != nil || got != c.want {
			t.Errorf("%q in state %s: %d, %v; want %d", c.name, c.state, got, err, c.want)
		}
	}
	if _, err := parseStat([]byte("7 (x) S 1")); err == nil {
		t.Error("a short line passed")
	}
}

func TestGenerations(t *testing.T) {
	nodes := map[string]uint64{"disk1-raw0": 1, "disk1-nbd7": 1, "disk10-nbd40": 1, "disk0-nbd9": 1, "disk1-nbdx": 1}
	if got := nextGen(nodes, 1); got != 8 {
		t.Errorf("next generation %d, want 8", got)
	}
	if got := nextGen(nodes, 2); got != 0 {
		t.Errorf("next generation of a disk without nodes %d", got)
	}
	if got := oldNodes(nodes, 10); len(got) != 1 || got[0] != "disk10-nbd40" {
		t.Errorf("nodes of disk 10: %v", got)
	}
	if got := oldNodes(nodes, 1); len(got) != 3 || got[0] != "disk1-raw0" {
		t.Errorf("nodes of disk 1: %v, want the raw one first", got)
	}
}
