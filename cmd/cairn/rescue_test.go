package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// vmOn waits until a VM runs on a host other than those named, and returns it.
func (m *machines) vmOn(name string, not ...string) (v vmView) {
	m.t.Helper()
	until(m.t, fmt.Sprintf("VM %s running, not on %v", name, not), func() bool {
		r := m.cairn("vm", "show", name, "-o", "json")
		if r.status != 0 {
			return false
		}
		v = decodeJSON[vmView](m.t, r.out)
		ok := v.State == "running" && v.Step == ""
		for _, h := range not {
			ok = ok && v.Host != h
		}
		return ok
	})
	return v
}

// lives reports whether a process runs; a zombie does not.
func lives(pid int64) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, ok := strings.Cut(string(b), ") ")
	return err == nil && ok && !strings.HasPrefix(after, "Z")
}

// threeVMHosts is a cluster of three machines with room for VMs.
func threeVMHosts(t *testing.T) *machines {
	t.Helper()
	m := newMachines(t)
	for n := 1; n <= 3; n++ {
		m.config("meta.toml", n)
		m.start(fmt.Sprintf("meta-%d", n))
	}
	for n := 1; n <= 3; n++ {
		m.config("host.toml", n, "cpus = 4", `memory = "1G"`)
		m.start(fmt.Sprintf("host-%d", n))
	}
	return m
}

// A host's process dies: its VM is started elsewhere by itself. The old QEMU
// lives on, and is ended when the host comes back. Then its new host is drained,
// and the VM moves on by itself.
func TestVMsOfALostHostAreStartedElsewhere(t *testing.T) {
	m := threeVMHosts(t)
	m.ok("place", "policy", "--restart-after", "5s", "--rebalance", "off")
	m.ok("volume", "create", "v", "--size", "256M")
	m.ok("vm", "create", "web", "--volume", "v", "--memory", "64M")
	defer m.cairn("vm", "stop", "web", "--force")
	m.ok("vm", "start", "web")
	first := m.vmOn("web")

	m.stop(first.Host, syscall.SIGKILL)
	second := m.vmOn("web", first.Host)
	if !lives(first.Pid) {
		t.Fatalf("the old QEMU (pid %d) did not outlive its host's process: the test shows nothing", first.Pid)
	}
	m.start(first.Host)
	until(t, "the old QEMU ended", func() bool { return !lives(first.Pid) })
	if now := m.vmOn("web", first.Host); now.Pid != second.Pid || now.Host != second.Host {
		t.Fatalf("the VM is on %s (pid %d) and was on %s (pid %d)", now.Host, now.Pid, second.Host, second.Pid)
	}

	m.ok("host", "drain", second.Host)
	until(t, "the VM leaving the drained host", func() bool {
		return decodeJSON[vmView](t, m.ok("vm", "show", "web", "-o", "json")).Step == "evicting"
	})
	if err := syscall.Kill(int(second.Pid), syscall.SIGKILL); err != nil { // there is no guest in it to power off
		t.Fatal(err)
	}
	m.vmOn("web", second.Host)
	m.ok("vm", "stop", "web", "--force")
	for n := 1; n <= 3; n++ {
		m.stop(fmt.Sprintf("host-%d", n), syscall.SIGTERM)
	}
}

// A VM that was started away from its data reads it much: the chunk comes to its
// host by itself, and further reads are local. Then the volume gets two more
// copies, and gives them up again, while it is used.
func TestHotDataComesToItsVM(t *testing.T) {
	m := threeVMHosts(t)
	m.ok("place", "policy", "--rebalance", "data")
	m.ok("volume", "create", "v", "--size", "256M", "--replicas", "1")
	uri := m.ok("volume", "attach", "v", "--host", "host-1")
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 64M", "-c", "flush", strings.TrimSpace(uri))
	m.ok("volume", "detach", "v")
	m.ok("vm", "create", "web", "--volume", "v", "--memory", "64M")
	defer m.cairn("vm", "stop", "web", "--force")
	m.ok("vm", "start", "web", "--host", "host-2")
	uri = strings.TrimSpace(m.ok("volume", "attach", "v", "--host", "host-2")) // the VM's own attachment
	for range 4 {
		tool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 64M", uri)
	}
	copies := func() string {
		v := decodeJSON[volumeView](t, m.ok("volume", "show", "v", "-o", "json"))
		var out []string
		for _, x := range v.Members {
			out = append(out, fmt.Sprintf("%s %v", x.Host, x.InSync))
		}
		return strings.Join(out, ", ")
	}
	until(t, "the chunk on host-2", func() bool { return copies() == "host-2 true" })
	if ev := m.ok("events"); !strings.Contains(ev, "placement moves 1 chunks of volume v (move data) from host host-1 to host host-2: VM web there reads and writes it") {
		t.Errorf("no event says what was moved and why:\n%s", ev)
	}
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 64M", uri)
	m.ok("volume", "set", "v", "--replicas", "3")
	until(t, "three copies", func() bool { return strings.Count(copies(), " true") == 3 })
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 8 0 1M", "-c", "read -P 7 1M 63M", uri)
	m.ok("volume", "set", "v", "--replicas", "1")
	until(t, "one copy, on the VM's host", func() bool { return copies() == "host-2 true" })
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 8 0 1M", "-c", "read -P 7 1M 63M", uri)
	if r := m.cairn("volume", "set", "v", "--replicas", "6"); r.status != exitUsage || !strings.Contains(r.err, "1 to 5") {
		t.Errorf("six copies: %+v", r)
	}
	m.ok("vm", "stop", "web", "--force")
	for n := 1; n <= 3; n++ {
		m.stop(fmt.Sprintf("host-%d", n), syscall.SIGTERM)
	}
}
