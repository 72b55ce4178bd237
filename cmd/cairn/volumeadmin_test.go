package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
)

// fails runs a command that must fail, saying something.
func (n *node) fails(says string, args ...string) {
	n.t.Helper()
	if r := n.cairn(args...); r.status != exitFailed || !strings.Contains(r.err, says) {
		n.t.Fatalf("cairn %v: status %d, %q: want %d saying %q", args, r.status, r.err, exitFailed, says)
	}
}

// until asks again until ok, within a bound.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(commandWait); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func decodeJSON[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// A shrink names what is in its way, cuts it when told to, gives every byte back
// until it is final, and then its space; the place reads as zeros after growing
// again. A removed volume comes back with every byte; once its time is over, the
// space it had on the stores is free. The sums of df are right at each step.
func TestShrinkUndoRemoveUndelete(t *testing.T) {
	n := startUp(t, dir(t))
	n.ok("volume", "create", "v", "--size", "1G", "--tag", "tier=gold", "--tenant", "acme")
	uri := n.ok("volume", "attach", "v")
	io := func(cmds ...string) string {
		args := []string{"-f", "raw"}
		for _, c := range cmds {
			args = append(args, "-c", c)
		}
		return tool(t, "qemu-io", append(args, uri)...)
	}
	reads := func(pattern string, where string) {
		t.Helper()
		if out := io("read -P " + pattern + " " + where); strings.Contains(out, "verification failed") {
			t.Fatalf("%s does not read as %s: %s", where, pattern, out)
		}
	}
	df := func() poolView {
		t.Helper()
		p := decodeJSON[poolView](t, n.ok("df", "-o", "json"))
		if p.Capacity != p.Live+p.Reclaimable+p.Free || p.Live != p.OfVolumes+p.OfDeleted+p.OfNobody || len(p.Silent) > 0 {
			t.Fatalf("df does not add up: %+v", p)
		}
		var logical, placed, live uint64
		for _, v := range p.Volumes {
			logical, placed, live = logical+v.Logical, placed+v.Placed, live+v.Live
		}
		if logical != p.Logical || placed != p.Placed || live != p.OfVolumes+p.OfDeleted {
			t.Fatalf("df's volumes do not add up: %+v", p)
		}
		return p
	}
	io("write -P 7 0 4M", "write -P 9 700M 1M", "flush")
	if p := df(); p.OfVolumes != 3*(5<<20) || p.Placed != 3*2*(64<<20) {
		t.Fatalf("5 MiB in two chunks, three copies: %+v", p)
	}
	n.fails("1048576 bytes of data lie beyond, at 734003200-735051776", "volume", "resize", "v", "--size", "512M")
	io("write -P 8 512M 64k") // the limit is lifted after a refusal
	reads("8", "512M 64k")
	n.ok("volume", "resize", "v", "--size", "512M", "--discard-tail")
	n.fails("undo-shrink v", "volume", "resize", "v", "--size", "2G")
	n.ok("volume", "undo-shrink", "v")
	reads("8", "512M 64k")
	reads("9", "700M 1M")
	n.ok("volume", "resize", "v", "--size", "512M", "--discard-tail")
	n.ok("volume", "undo-shrink", "v", "--forget")
	until(t, "the cut chunks' space comes back", func() bool { return df().OfVolumes == 3*(4<<20) })
	n.ok("volume", "resize", "v", "--size", "2G")
	reads("0", "512M 256M")
	io("write -P 5 700M 1M", "flush")
	reads("5", "700M 1M")
	n.ok("volume", "resize", "v", "--size", "1G") // nothing lies beyond
	if w := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json")); w.SizeBytes != 1<<30 || w.Shrunk != 2<<30 || w.Tags["tier"] != "gold" {
		t.Fatalf("shown as %+v", w)
	}

	n.fails("detach it first", "volume", "rm", "v")
	n.ok("volume", "detach", "v")
	n.ok("volume", "rm", "v")
	n.fails("no volume", "volume", "attach", "v")
	if p := df(); p.OfDeleted != 3*(5<<20) || p.OfVolumes != 0 {
		t.Fatalf("after the removal: %+v", p)
	}
	if ts := decodeJSON[[]tenantView](t, n.ok("tenant", "ls", "-o", "json")); len(ts) != 1 || ts[0].Deleted != 1<<30 {
		t.Fatalf("tenants %+v", ts)
	}
	n.ok("volume", "undelete", "v", "--name", "w")
	uri = n.ok("volume", "attach", "w")
	reads("7", "0 4M")
	reads("5", "700M 1M")
	n.ok("volume", "detach", "w")
	n.ok("volume", "rm", "w", "--keep", "1s") // and then by itself
	until(t, "the removed volume's space comes back", func() bool { p := df(); return p.Live == 0 && len(p.Volumes) == 0 })
	n.fails("no deleted volume", "volume", "undelete", "w")
	n.ok("volume", "create", "w", "--size", "1G")
	n.ok("volume", "rm", "w", "--now")
	n.fails("no deleted volume", "volume", "undelete", "w")
}

// Volumes of one command are all there or none, also right after the cluster's start.
func TestVolumesAreCreatedTogether(t *testing.T) {
	n := startUp(t, dir(t), "--store-size", "1G")
	names := func() (out []string) {
		for _, v := range decodeJSON[[]volumeView](t, n.ok("volume", "ls", "-o", "json")) {
			out = append(out, v.Name)
		}
		return out
	}
	n.ok("volume", "create", "a", "b", "c", "--size", "64M", "--replicas", "2", "--tag", "of=web")
	n.refuses("volume b exists already", "volume", "create", "d", "b", "--size", "64M")
	n.refuses("d is to be created twice", "volume", "create", "d", "e", "d", "--size", "64M")
	if got := names(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("there are %v", got)
	}
	for _, name := range names() {
		if v := decodeJSON[volumeView](t, n.ok("volume", "show", name, "-o", "json")); v.SizeBytes != 64<<20 || v.Replicas != 2 || v.Tags["of"] != "web" {
			t.Errorf("%+v", v)
		}
	}
}
