package placement

import (
	"errors"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/proto/status"
)

// host is an idle host of 8 CPUs and 16 GiB.
func host(name string, change ...func(*Host)) Host {
	h := Host{Name: name, Up: true, CPUs: 8, MemoryBytes: 16 * gib}
	for _, c := range change {
		c(&h)
	}
	return h
}

func off(h *Host) { h.Up = false }
func busy(cpus uint32, mem uint64) func(*Host) {
	return func(h *Host) { h.UsedCPUs, h.UsedMemory = cpus, mem }
}
func data(bytes uint64) func(*Host) { return func(h *Host) { h.LocalBytes = bytes } }

func vm(policy Policy, hosts ...Host) VMRequest {
	return VMRequest{Name: "web", CPUs: 2, MemoryBytes: 4 * gib, Policy: policy, Hosts: hosts}
}

func TestVMGoesTo(t *testing.T) {
	for _, c := range []struct {
		name   string
		req    VMRequest
		host   string
		reason string
	}{
		{"most of the data", vm("", host("a"), host("b", data(5*gib), busy(4, 8*gib)), host("c", data(gib))), "b",
			"b has the most of the data of the 3 hosts that fit, 5.0 GiB (next is c with 1.0 GiB): with it 2 of 8 CPUs and 4.0 GiB of 16.0 GiB memory stay free"},
		{"most of the data that fits", vm("", host("a", data(5*gib), busy(7, 0)), host("b", data(5*gib), busy(0, 13*gib)), host("c", data(gib))), "c",
			"c is the only one of 3 hosts that fits: it has 1.0 GiB of the data, and with it 6 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"equal data, more room", vm("", host("a", data(5*gib+4096), busy(4, 0)), host("b", data(5*gib))), "b",
			"b has 5.0 GiB of the data, as much as any of the 2 hosts that fit (to 1 %), and the most room of those: with it 6 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"no data at all", vm("", host("b"), host("a"), host("c", busy(1, 0))), "a",
			"no host that fits has any of the data, and a has the most room of the 3 hosts that fit: with it 6 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"min", vm(BestFit, host("a", data(5*gib)), host("b", busy(6, 0)), host("c", busy(3, 0))), "b",
			"b is the tightest fit of the 3 hosts that fit: with it 0 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"max", vm(WorstFit, host("a", data(5*gib), busy(1, 0)), host("b", busy(6, 0)), host("c", busy(0, 3*gib))), "a",
			"a has the most room of the 3 hosts that fit: with it 5 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"balanced", vm(Balanced, host("a", data(5*gib)), host("b", busy(1, 0)), host("c", busy(4, 8*gib))), "a",
			"a keeps CPU and memory use closest of the 3 hosts that fit, 0.0 % apart: with it 6 of 8 CPUs and 12.0 GiB of 16.0 GiB memory stay free"},
		{"balanced fills the gap", vm(Balanced, host("a", busy(1, 0)), host("b", busy(4, 7*gib))), "b",
			"b keeps CPU and memory use closest of the 2 hosts that fit, 6.2 % apart: with it 2 of 8 CPUs and 5.0 GiB of 16.0 GiB memory stay free"},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, err := PlaceVM(c.req)
			if err != nil {
				t.Fatal(err)
			}
			if plan.Host != c.host || plan.Reason != c.reason {
				t.Errorf("got %s: %s\nwant %s: %s", plan.Host, plan.Reason, c.host, c.reason)
			}
		})
	}
}

func TestVMErrorsSayWhatIsMissing(t *testing.T) {
	for _, c := range []struct {
		name string
		req  VMRequest
		kind status.Kind
		text string
	}{
		{"no host", vm(""), status.NoSpace, "VM web needs a host with 2 CPUs and 4.0 GiB of memory free, there is no host at all; add one"},
		{"full", vm("", host("b", busy(0, 13*gib)), host("a", busy(7, 0)), host("c", off, busy(9, 0))), status.NoSpace,
			"VM web needs a host with 2 CPUs and 4.0 GiB of memory free, there is none: a has 1 of 8 CPUs free, b has 3.0 GiB of 16.0 GiB memory free, c is down and has 0 of 8 CPUs free; add a host, stop a VM or ask for less"},
		{"down", vm("", host("a", busy(7, 0)), host("b", off)), status.Unavailable,
			"VM web needs a host with 2 CPUs and 4.0 GiB of memory free, there is none: a has 1 of 8 CPUs free, b is down; bring a host back or ask again"},
		{"policy", vm("best"), status.Invalid, `there is no placement policy "best": use local, min, max or balanced`},
		{"nothing asked", VMRequest{Name: "web"}, status.Invalid, "VM web asks for 0 CPUs and 0 bytes of memory: both must be above 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, err := PlaceVM(c.req)
			if !errors.Is(err, c.kind) || err.Error() != c.text || plan.Host != "" {
				t.Fatalf("got %v on %q: %v\nwant %v: %s", status.Of(err), plan.Host, err, c.kind, c.text)
			}
		})
	}
}

// The chosen host is up and fits under every policy, near-data has the most
// data of those that fit, and the order of hosts does not matter.
func TestVMProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		req := vm(rapid.SampledFrom(Policies).Draw(t, "policy"))
		req.CPUs = uint32(rapid.IntRange(1, 6).Draw(t, "vm cpus"))
		req.MemoryBytes = uint64(rapid.IntRange(1, 6).Draw(t, "vm memory")) * gib
		for i := range rapid.IntRange(0, 8).Draw(t, "hosts") {
			req.Hosts = append(req.Hosts, Host{Name: string(rune('a' + i)), Up: rapid.Bool().Draw(t, "up"),
				CPUs: uint32(rapid.IntRange(0, 8).Draw(t, "cpus")), UsedCPUs: uint32(rapid.IntRange(0, 9).Draw(t, "used cpus")),
				MemoryBytes: uint64(rapid.IntRange(0, 8).Draw(t, "memory")) * gib, UsedMemory: uint64(rapid.IntRange(0, 9).Draw(t, "used memory")) * gib,
				LocalBytes: uint64(rapid.IntRange(0, 3).Draw(t, "data")) * gib})
		}
		fits := func(h Host) bool {
			return h.Up && h.UsedCPUs+req.CPUs <= h.CPUs && h.UsedMemory+req.MemoryBytes <= h.MemoryBytes
		}
		plan, err := PlaceVM(req)
		again := req
		again.Hosts = rapid.Permutation(req.Hosts).Draw(t, "order")
		plan2, _ := PlaceVM(again)
		if plan.Host != plan2.Host || plan.Reason != plan2.Reason || !reflect.DeepEqual(plan.Scores, plan2.Scores) {
			t.Fatalf("the order of hosts changed the answer: %s, %s", plan.Reason, plan2.Reason)
		}
		var most uint64
		any := false
		for _, h := range req.Hosts {
			if fits(h) {
				any, most = true, max(most, h.LocalBytes)
			}
		}
		if any != (err == nil) {
			t.Fatalf("some host fits: %v, got %v", any, err)
		}
		for _, h := range req.Hosts {
			if h.Name == plan.Host && (!fits(h) || (req.Policy == NearData && h.LocalBytes != most)) {
				t.Fatalf("chose %+v, most data is %d", h, most)
			}
		}
	})
}

func TestExplainVM(t *testing.T) {
	plan, err := PlaceVM(vm("", host("host-1", data(5*gib), busy(6, 2*gib)), host("host-2", data(5*gib)), host("host-3", data(2*gib)), host("host-4", off), host("host-5", busy(8, 0))))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "vm.golden", plan.Explain())
	plan, err = PlaceVM(vm(BestFit, host("host-1", off), host("host-2", busy(7, 0))))
	if !errors.Is(err, status.Unavailable) {
		t.Fatal(err)
	}
	golden(t, "vm-none.golden", plan.Explain())
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 64 * mib: "64.0 MiB",
		gib - 1: "1.0 GiB", 1<<64 - 1: "16.0 EiB", 1536: "1.5 KiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}
