package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// A host dies for good, of a cluster in three racks: the event log says that it is silent, and after the time
// its neighbours are told to wait for it all of its copies are on the spare host,
// with nothing lost.
func TestALostHostsCopiesAreMadeElsewhere(t *testing.T) {
	m := newMachines(t)
	for n := 1; n <= 3; n++ {
		m.config("meta.toml", n)
		m.start(fmt.Sprintf("meta-%d", n))
	}
	for n := 1; n <= 4; n++ {
		m.config("host.toml", n, `replace_after = "2s"`)
		m.start(fmt.Sprintf("host-%d", n))
	}
	m.ok("volume", "create", "v", "--size", "512M")
	uri := m.ok("volume", "attach", "v", "--host", "host-1")
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "write -P 8 64M 1M", "-c", "write -P 9 128M 1M", "-c", "flush", uri)
	show := func() volumeView { return decodeJSON[volumeView](t, m.ok("volume", "show", "v", "-o", "json")) }
	lost := ""
	for _, x := range show().Members {
		if x.Host != "host-1" {
			lost = x.Host
		}
	}
	m.ok("volume", "create", "racks", "--size", "512M", "--domain", "rack")
	racks := m.ok("volume", "attach", "racks", "--host", "host-2")
	for i := range 8 {
		tool(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P %d %dM 4k", i+1, 64*i), racks)
	}
	oneEach := func() {
		t.Helper()
		chunks := decodeJSON[[]mapView](t, m.ok("volume", "map", "racks", "-o", "json"))
		if len(chunks) != 8 {
			t.Fatalf("%d chunks of 8", len(chunks))
		}
		for _, c := range chunks {
			in := map[string]string{}
			for _, x := range c.Copies {
				n := 0
				if _, err := fmt.Sscanf(x.Host, "host-%d", &n); err != nil {
					t.Fatal(err)
				}
				if other, ok := in[rackOf(n)]; ok && x.Replaces == "" {
					t.Errorf("chunk %d has copies on %s and %s, in one rack", c.Chunk, other, x.Host)
				}
				in[rackOf(n)] = x.Host
			}
			if len(in) != 3 {
				t.Errorf("chunk %d is in %d racks: %v", c.Chunk, len(in), in)
			}
		}
	}
	oneEach()
	m.stop(lost, syscall.SIGKILL)
	until(t, "the copies of "+lost+" are made elsewhere", func() bool {
		v := show()
		return len(v.Members) == 3 && !slices.ContainsFunc(v.Members, func(x memberView) bool { return x.Host == lost || !x.InSync })
	})
	oneEach()
	until(t, "it is told", func() bool { return strings.Contains(m.ok("events"), "host "+lost+" does not answer") })
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "read -P 8 64M 1M", "-c", "read -P 9 128M 1M", uri)
	m.start(lost)
	until(t, "its return is told", func() bool { return strings.Contains(m.ok("events"), "host "+lost+" answers again") })
}
