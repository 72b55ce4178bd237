package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Stores on the command line: listed, shown, scrubbed, verified; retired until
// nothing is left on one, with the volume in use; and explained, and found
// damaged, when their hosts are down.
func TestStores(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--hosts", "4", "--store-size", "2G")
	n.ok("volume", "create", "v", "--size", "256M")
	uri := strings.TrimSpace(n.ok("volume", "attach", "v", "--host", "host-1"))
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 90 0 64M", "-c", "flush", uri)
	show := func(id string) storeDetail {
		return decodeJSON[storeDetail](t, n.ok("store", "show", id, "-o", "json"))
	}
	var used []storeDetail // stores that hold the volume, the gateway's not
	for _, s := range decodeJSON[[]storeView](t, n.ok("store", "ls", "-o", "json")) {
		if x := show(s.ID[:8]); x.Host != "host-1" && x.Live >= 64<<20 {
			used = append(used, x)
		}
	}
	if len(used) < 2 {
		t.Fatalf("%d stores beside the gateway's hold 64 MiB", len(used))
	}
	goes, stays := used[0], used[1]

	n.ok("store", "scrub", goes.ID, "--pace", "4G", "--wait")
	if s := show(goes.ID).Scrub; s.Running || s.Verified < 64<<20>>12 || s.AgeS < 0 || s.BadBlocks != 0 {
		t.Errorf("after a scrub: %+v", s)
	}
	if s := decodeJSON[storeDetail](t, n.ok("store", "verify", stays.ID, "-o", "json")); s.ID != stays.ID || s.Scrub.AgeS < 0 || len(s.Bad) != 0 {
		t.Errorf("a verified store: %+v", s)
	}
	for say, args := range map[string][]string{"no store": {"store", "show", "zz"}, "there is no file": {"store", "dump", d + "/nothing"}} {
		if r := n.cairn(args...); r.status != exitFailed || !strings.Contains(r.err, say) {
			t.Errorf("cairn %v: status %d, %q; want one line with %q", args, r.status, r.err, say)
		}
	}

	n.ok("store", "retire", goes.ID)
	until(t, "the retired store is empty, and the volume whole elsewhere", func() bool {
		v := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json"))
		in := 0
		for _, m := range v.Members {
			if m.InSync && m.State == "in-sync" && m.Store != goes.ID {
				in++
			}
		}
		x := show(goes.ID)
		return in == 3 && x.Retired && x.CopiesLeft == 0 && x.Live == 0
	})
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 90 0 64M", uri)
	n.ok("store", "retire", goes.ID, "--undo")
	if show(goes.ID).Retired {
		t.Error("a store that was put into service again is retired")
	}
	if r := n.cairn("store", "grow", goes.Path, "--size", "3G"); r.status != exitFailed || !strings.Contains(r.err, "stop it first") {
		t.Errorf("a running store was grown: %+v", r)
	}
	n.interrupt()

	for _, path := range []string{goes.Path, stays.Path} {
		if r := n.cairn("store", "verify", path); r.status != 0 {
			t.Errorf("a sound store: %+v", r)
		}
	}
	if out := n.ok("store", "dump", stays.Path, "-o", "json"); !json.Valid([]byte(out)) {
		t.Errorf("no JSON: %s", out)
	}
	for _, args := range [][]string{{goes.Path}, {goes.Path, "--size", "1G"}, {goes.Path, "--size", "much"}} {
		if r := n.cairn(append([]string{"store", "grow"}, args...)...); r.status != exitUsage {
			t.Errorf("store grow %v: %+v", args, r)
		}
	}
	n.ok("store", "grow", goes.Path, "--size", "3G")
	n = startUp(t, d, "--hosts", "4", "--store-size", "2G")
	if x := show(goes.ID); x.Size != 3<<30 || x.Capacity < goes.Capacity*4/3 || x.Kind != goes.Kind || x.Incarnation != goes.Incarnation {
		t.Errorf("grown from %+v to %+v", goes, x)
	}
	if r := n.cairn("store", "rm", goes.ID); r.status != exitFailed || !strings.Contains(r.err, "in service") {
		t.Errorf("a store in service is removed: %+v", r)
	}
	n.interrupt()

	// The disk is lost, and another is put in its place.
	if err := os.Remove(goes.Path); err != nil {
		t.Fatal(err)
	}
	n = startUp(t, d, "--hosts", "4", "--store-size", "2G")
	n.ok("store", "retire", goes.ID)
	until(t, "the lost store is forgotten", func() bool { return n.cairn("store", "rm", goes.ID).status == 0 })
	if stores := decodeJSON[[]storeView](t, n.ok("store", "ls", "-o", "json")); len(stores) != 4 || slices.ContainsFunc(stores, func(s storeView) bool { return s.ID == goes.ID }) {
		t.Errorf("after the removal: %+v", stores)
	}
	n.interrupt()
	damage(t, stays.Path)
	if r := n.cairn("store", "dump", stays.Path); r.status != exitFailed || !strings.Contains(r.out+r.err, "damage") {
		t.Errorf("a flipped bit was not found: status %d, %s", r.status, r.err)
	}
}

// damage flips a bit in a block that holds the test's data.
func damage(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	block, want := make([]byte, 4096), bytes.Repeat([]byte{90}, 4096)
	for at := int64(0); ; at += 4096 {
		if _, err := f.ReadAt(block, at); err == io.EOF {
			t.Fatal("the store holds none of the data")
		} else if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(block, want) {
			block[77] ^= 4
			if _, err := f.WriteAt(block, at); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

// A store on a block device keeps what it was given over its host's death, and
// when the device grows; a device that holds something else is left alone, and
// the host says so.
func TestStoreOnADevice(t *testing.T) {
	m := newMachines(t)
	for n := 1; n <= 3; n++ {
		m.config("meta.toml", n)
		m.start(fmt.Sprintf("meta-%d", n))
	}
	mine, foreign := loopDevice(t), loopDevice(t)
	if f, err := os.OpenFile(foreign, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.WriteAt([]byte("somebody's file system"), 4096); err != nil {
		t.Fatal(errors.Join(err, f.Close()))
	} else if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	file := m.config("host.toml", 1)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(text), "[[store]]")
	if !ok {
		t.Fatalf("no store in %s", text)
	}
	for _, dev := range []string{mine, foreign} {
		head += fmt.Sprintf("[[store]]\npath = %q\n\n", dev)
	}
	if err := os.WriteFile(file, []byte(head), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start("host-1")
	m.ok("volume", "create", "v", "--size", "256M", "--replicas", "1")
	uri := strings.TrimSpace(m.ok("volume", "attach", "v"))
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 91 0 32M", "-c", "flush", uri)
	m.stop("host-1", syscall.SIGKILL)
	m.start("host-1")
	until(t, "the volume is attached again", func() bool {
		return decodeJSON[volumeView](t, m.ok("volume", "show", "v", "-o", "json")).State == "attached"
	})
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 91 0 32M", uri)
	stores := decodeJSON[[]storeView](t, m.ok("store", "ls", "-o", "json"))
	if len(stores) != 1 || stores[0].Live < 32<<20 {
		t.Fatalf("stores: %+v", stores)
	}
	small := decodeJSON[storeDetail](t, m.ok("store", "show", stores[0].ID, "-o", "json"))
	if small.Path != mine || small.Kind != "device" {
		t.Errorf("the store is on %s, a %s", small.Path, small.Kind)
	}
	m.stop("host-1", syscall.SIGTERM)
	if r := run(t, bin(t), "store", "verify", mine); r.status != 0 {
		t.Errorf("a sound device: %+v", r)
	}
	if r := run(t, bin(t), "store", "grow", mine); r.status == 0 || !strings.Contains(r.err, "no room for another segment") {
		t.Errorf("a device that did not grow: %+v", r)
	}
	if err := os.Truncate(strings.TrimSpace(tool(t, "losetup", "--noheadings", "--output", "BACK-FILE", mine)), 2<<30); err != nil {
		t.Fatal(err)
	}
	tool(t, "losetup", "--set-capacity", mine)
	if r := run(t, bin(t), "store", "grow", mine); r.status != 0 || !strings.Contains(r.out, mine) {
		t.Errorf("a device that grew: %+v", r)
	}
	m.start("host-1")
	until(t, "the volume is attached once more", func() bool {
		return decodeJSON[volumeView](t, m.ok("volume", "show", "v", "-o", "json")).State == "attached"
	})
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 91 0 32M", uri)
	if x := decodeJSON[storeDetail](t, m.ok("store", "show", small.ID, "-o", "json")); x.Size != 2<<30 || x.Capacity < 2*small.Capacity {
		t.Errorf("grown from %+v to %+v", small, x)
	}
	m.stop("host-1", syscall.SIGTERM)
	if r := run(t, bin(t), "store", "verify", mine); r.status != 0 {
		t.Errorf("a sound device that grew: %+v", r)
	}
	f, err := os.Open(foreign)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 22)
	_, err = f.ReadAt(got, 4096)
	if err := errors.Join(err, f.Close()); err != nil || string(got) != "somebody's file system" {
		t.Errorf("the foreign device holds %q now: %v", got, err)
	}
}

// loopDevice is a block device of 1 GiB that is gone at the test's end, however it
// ends: detaching one that is open means when it is closed.
func loopDevice(t *testing.T) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "img")
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 1<<30)); err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(tool(t, "losetup", "--find", "--show", img))
	f, err := os.Open(dev)
	tool(t, "losetup", "--detach", dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev
}
