package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// A host dies for good: the event log says that it is silent, and after the time
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
	m.stop(lost, syscall.SIGKILL)
	until(t, "the copies of "+lost+" are made elsewhere", func() bool {
		v := show()
		return len(v.Members) == 3 && !slices.ContainsFunc(v.Members, func(x memberView) bool { return x.Host == lost || !x.InSync })
	})
	until(t, "it is told", func() bool { return strings.Contains(m.ok("events"), "host "+lost+" does not answer") })
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "read -P 8 64M 1M", "-c", "read -P 9 128M 1M", uri)
	m.start(lost)
	until(t, "its return is told", func() bool { return strings.Contains(m.ok("events"), "host "+lost+" answers again") })
}
