package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

// TestArchiveIsCpio lets cpio(1) unpack what archive writes.
func TestArchiveIsCpio(t *testing.T) {
	a := &archive{}
	a.dir("d")
	for n := range 5 { // every padding
		a.file(fmt.Sprintf("d/file%.*s", n, "abcd"), 0o640, []byte("12345678"[:n]))
	}
	a.link("link", "d/file")
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-i", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(a.bytes())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for n := range 5 {
		name := filepath.Join(dir, fmt.Sprintf("d/file%.*s", n, "abcd"))
		data, err := os.ReadFile(name)
		if err != nil || string(data) != "12345678"[:n] {
			t.Errorf("%s: %q, %v", name, data, err)
		}
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if to, err := os.Readlink(filepath.Join(dir, "link")); err != nil || to != "d/file" {
		t.Errorf("link to %q, %v", to, err)
	}
}

func TestLoadOrder(t *testing.T) {
	needs := map[string][]string{"a": {"b", "c"}, "b": {"c"}, "c": nil, "d": {"a"}, "x": {"y"}, "y": {"x"}}
	depends := func(name string) ([]string, error) {
		deps, ok := needs[name]
		if !ok {
			return nil, status.Errorf(status.NotFound, "no module %s", name)
		}
		return deps, nil
	}
	got, err := loadOrder([]string{"a", "d", "c"}, depends)
	if err != nil || !slices.Equal(got, []string{"c", "b", "a", "d"}) {
		t.Errorf("order %v, %v", got, err)
	}
	if _, err := loadOrder([]string{"x"}, depends); !errors.Is(err, status.Corrupt) {
		t.Errorf("a circle: %v", err)
	}
	if _, err := loadOrder([]string{"none"}, depends); !errors.Is(err, status.NotFound) {
		t.Errorf("an unknown module: %v", err)
	}
}

func TestReadersOfToolOutput(t *testing.T) {
	info := []byte("license=GPL\x00depends=virtio,virtio-ring\x00retpoline=Y\x00")
	if got := dependsField(info); !slices.Equal(got, []string{"virtio", "virtio_ring"}) {
		t.Errorf("depends %v", got)
	}
	if got := dependsField([]byte("depends=\x00")); len(got) != 0 {
		t.Errorf("no depends: %v", got)
	}
	ldd := "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\t/lib64/ld.so.2 (0x7f)\n\tlibz.so => not found\n"
	if got := lddPaths(ldd); !slices.Equal(got, []string{"/lib/x/libc.so.6", "/lib64/ld.so.2"}) {
		t.Errorf("ldd %v", got)
	}
	apt := "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-1-cloud-amd64\n  Suggests: x\n"
	if got := dependsOn([]byte(apt), "linux-image-"); got != "linux-image-6.1.0-1-cloud-amd64" {
		t.Errorf("apt %q", got)
	}
	if got := dependsOn([]byte("N: no package\n"), "linux-image-"); got != "" {
		t.Errorf("apt without the package %q", got)
	}
}

func TestEncode(t *testing.T) {
	if got := string(encode("x")); got != "eA==\n.\n" {
		t.Errorf("%q", got)
	}
	for _, line := range strings.Split(string(encode(strings.Repeat("a\n'", CommandMaxBytes/3))), "\n") {
		if len(line) > lineBytes {
			t.Fatalf("a line of %d bytes", len(line))
		}
	}
}

func TestCacheDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	t.Setenv(CacheEnv, dir)
	if got, err := cacheDir(""); err != nil || got != dir {
		t.Errorf("%q, %v", got, err)
	}
	t.Setenv(CacheEnv, "")
	t.Setenv("HOME", "")
	t.Setenv("XDG_CACHE_HOME", "")
	if _, err := cacheDir(""); err == nil || !strings.Contains(err.Error(), CacheEnv) {
		t.Errorf("no home: %v", err)
	}
	if _, err := cacheDir("/proc/none"); err == nil || !strings.Contains(err.Error(), CacheEnv) {
		t.Errorf("a directory that cannot be made: %v", err)
	}
}
