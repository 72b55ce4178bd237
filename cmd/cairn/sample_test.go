package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/docs/samples"
)

// systemd opens the socket that the sample's host serves, under the name the
// host looks for, and starts both again however often they die.
func TestUnitsFitTheSampleHost(t *testing.T) {
	read := func(name string) string {
		b, err := samples.Files.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	file := filepath.Join(t.TempDir(), "host.toml")
	if err := os.WriteFile(file, []byte(read("host.toml")), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := loadHostConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	unit := read("cairn-host.socket")
	for _, line := range []string{"ListenStream=" + c.NBD, "FileDescriptorName=" + nbdSocketName} {
		if !strings.Contains(unit, line+"\n") {
			t.Errorf("cairn-host.socket has no line %q", line)
		}
	}
	for _, name := range []string{"cairn-host.service", "cairn-meta.service"} {
		for _, line := range []string{"StartLimitIntervalSec=0", "Restart=always"} {
			if !strings.Contains(read(name), line+"\n") {
				t.Errorf("%s has no line %q", name, line)
			}
		}
	}
}
