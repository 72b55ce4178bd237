package main

import (
	"slices"
	"strings"
	"testing"
)

// What differs between snapshots is what was written between them, whether the
// volume is in use or not; what nobody wrote is not listed. The map says where
// each chunk lies.
func TestDiffAndMap(t *testing.T) {
	n := startUp(t, dir(t))
	n.ok("volume", "create", "v", "--size", "256M")
	io := func(cmd string) {
		t.Helper()
		tool(t, "qemu-io", "-f", "raw", n.ok("volume", "attach", "v"), "-c", cmd, "-c", "flush")
	}
	diff := func(want []rangeView, args ...string) {
		t.Helper()
		v := decodeJSON[diffView](t, n.ok(append([]string{"volume", "diff", "-o", "json"}, args...)...))
		if !slices.Equal(v.Ranges, want) {
			t.Fatalf("diff %v: %+v, want %+v", args, v.Ranges, want)
		}
	}
	io("write -P 1 1M 2M")
	io("write -P 1 200M 4k")
	n.ok("volume", "snapshot", "v", "--name", "a")
	io("write -P 2 2M 8k")
	io("write -z -u 1M 64k")
	io("write -P 3 130M 4k")
	n.ok("volume", "snapshot", "v", "--name", "b")
	io("write -P 4 8M 4k")
	const m = 1 << 20
	all := []rangeView{{m, 2 * m, false}, {200 * m, 4096, false}}
	ab := []rangeView{{m, 64 << 10, true}, {2 * m, 8192, false}, {130 * m, 4096, false}}
	back := []rangeView{{m, 64 << 10, false}, {2 * m, 8192, false}, {130 * m, 4096, false}} // the same, and zero only by reading
	now := []rangeView{{8 * m, 4096, false}}
	for _, attached := range []bool{true, false} {
		diff(all, "v@a")
		diff(ab, "v@a", "v@b")
		diff(back, "v@b", "v@a")
		diff(now, "v@b", "v")
		if attached {
			n.ok("volume", "detach", "v")
		}
	}
	if v := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json")); v.Holder != "" {
		t.Fatalf("a diff has left the volume attached on %s", v.Holder)
	}
	n.ok("volume", "snapshot", "rm", "v@a", "--wait") // merged: what b has beyond nothing is more now
	diff([]rangeView{{m, 64 << 10, true}, {m + 64<<10, 2*m - 64<<10, false}, {130 * m, 4096, false}, {200 * m, 4096, false}}, "v@b")
	n.ok("volume", "clone", "v@b", "c")
	diff([]rangeView{{0, 64 * m, false}, {128 * m, 128 * m, false}}, "c") // of an origin: by whole chunks

	chunks := decodeJSON[[]mapView](t, n.ok("volume", "map", "v", "-o", "json"))
	var offs []uint64
	for _, c := range chunks {
		offs = append(offs, c.Offset)
		hosts := map[string]bool{}
		for _, cp := range c.Copies {
			hosts[cp.Host] = cp.InSync
		}
		if len(hosts) != 3 || !hosts["host-1"] || !hosts["host-2"] || !hosts["host-3"] || c.State != "live" || c.Length != 64*m {
			t.Fatalf("chunk %+v", c)
		}
	}
	if !slices.Equal(offs, []uint64{0, 128 * m, 192 * m}) {
		t.Fatalf("chunks at %v", offs)
	}
	n.fails("no snapshot \"nope\"", "volume", "diff", "v@nope", "v")
	n.fails("no volume", "volume", "map", "nope")
	for _, c := range []struct{ args, say string }{{"volume diff v@b c", "different volumes"}, {"volume diff v v@b", "does not name a snapshot"}, {"volume diff", "takes VOLUME@SNAPSHOT"}} {
		if r := n.cairn(strings.Fields(c.args)...); r.status != exitUsage || !strings.Contains(r.err, c.say) {
			t.Errorf("cairn %s: status %d, %q", c.args, r.status, r.err)
		}
	}
	if r := run(t, bin(t), "__complete", "--dir", n.dir, "volume", "clone", ""); !strings.Contains(r.out, "v@b") {
		t.Errorf("completion of snapshots: %q, %q", r.out, r.err)
	}
}
