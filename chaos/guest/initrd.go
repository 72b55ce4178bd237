package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

//go:embed rootfs/init
var initScript []byte

//go:embed rootfs/cairn-loop
var loopScript []byte

//go:embed rootfs/power
var powerScript []byte

// tool is a program of this machine that goes into the guest.
type tool struct{ name, pkg string }

// tools beside busybox; they are linked dynamically, so their libraries come
// along.
var tools = []tool{
	{"mkfs.ext4", "e2fsprogs"},
	{"resize2fs", "e2fsprogs"},
	{"e2fsck", "e2fsprogs"},
	{"fstrim", "util-linux"},
}

// storageTools are those of Config.Storage.
var storageTools = []tool{
	{"mkfs.xfs", "xfsprogs"},
	{"xfs_growfs", "xfsprogs"},
	{"xfs_repair", "xfsprogs"},
}

// sysDirs are searched after PATH: a plain user's PATH often lacks sbin.
var sysDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}

// ensureInitrd returns the path of the initrd made of the kernel's modules and
// this machine's tools. Its name holds the hash of its content, so a changed
// part gives a new file.
func ensureInitrd(ctx context.Context, kernel string, cfg Config) (string, error) {
	cpio, err := buildInitrd(ctx, kernel, cfg.Storage)
	if err != nil {
		return "", err
	}
	file := filepath.Join(kernel, "initrd-"+shortHash(cpio)+".gz")
	if _, err := os.Stat(file); err == nil {
		return file, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", status.Errorf(status.IO, "guest initrd: %w", err)
	}
	cfg.Progress("building the guest's initrd")
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	if _, err := zw.Write(cpio); err != nil {
		return "", status.Errorf(status.Internal, "compress the initrd: %w", err)
	}
	if err := zw.Close(); err != nil {
		return "", status.Errorf(status.Internal, "compress the initrd: %w", err)
	}
	if err := writeFile(file, out.Bytes(), 0o644); err != nil {
		return "", status.Errorf(status.IO, "keep the initrd: %w", err)
	}
	return file, nil
}

// buildInitrd returns the uncompressed archive.
func buildInitrd(ctx context.Context, kernel string, storage bool) ([]byte, error) {
	a := &archive{}
	for _, d := range []string{"bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "mnt", "proc", "run", "sys", "tmp", "var", "var/log", "var/run"} {
		a.dir(d)
	}
	a.link("sbin", "bin")
	a.char("dev/console", 5, 1)
	a.file("init", 0o755, initScript)
	a.file("bin/cairn-loop", 0o755, loopScript)
	a.file("etc/acpi/PWRF/00000080", 0o755, powerScript)
	a.link("etc/mtab", "/proc/mounts")
	a.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\n"))
	list, programs := moduleOrderFile, tools
	if storage {
		list, programs = storageOrderFile, append(slices.Clone(tools), storageTools...)
	}
	if err := addModules(a, kernel, list); err != nil {
		return nil, err
	}
	if err := addTools(ctx, a, programs); err != nil {
		return nil, err
	}
	return a.bytes(), nil
}

func addModules(a *archive, kernel, list string) error {
	order, err := os.ReadFile(filepath.Join(kernel, list))
	if err != nil {
		return status.Errorf(status.IO, "guest modules: %w", err)
	}
	a.file("lib/modules/order", 0o644, order)
	for _, name := range strings.Fields(string(order)) {
		data, err := os.ReadFile(filepath.Join(kernel, name+".ko"))
		if err != nil {
			return status.Errorf(status.IO, "guest module: %w; remove %s to fetch it again", err, kernel)
		}
		a.file("lib/modules/"+name+".ko", 0o644, data)
	}
	return nil
}

// addTools adds busybox, the tools and the libraries they are linked with.
func addTools(ctx context.Context, a *archive, programs []tool) error {
	box, err := findTool(tool{"busybox", "busybox-static"})
	if err != nil {
		return err
	}
	if libs, err := libraries(ctx, box); err != nil {
		return err
	} else if len(libs) > 0 {
		return status.Errorf(status.Unsupported, "%s is linked dynamically; the guest needs the static one: apt-get install busybox-static", box)
	}
	if err := addFile(a, "bin/busybox", box); err != nil {
		return err
	}
	libs := map[string]bool{}
	for _, t := range programs {
		file, err := findTool(t)
		if err != nil {
			return err
		}
		if err := addFile(a, "bin/"+t.name, file); err != nil {
			return err
		}
		needed, err := libraries(ctx, file)
		if err != nil {
			return err
		}
		for _, l := range needed {
			libs[l] = true
		}
	}
	return addLibraries(a, libs)
}

// addLibraries adds each library under the path its loader looks for.
func addLibraries(a *archive, libs map[string]bool) error {
	files := make([]string, 0, len(libs))
	for l := range libs {
		files = append(files, l)
	}
	sort.Strings(files)
	made := map[string]bool{"lib": true}
	for _, l := range files {
		addDirs(a, made, path.Dir(l[1:]))
		if err := addFile(a, l[1:], l); err != nil {
			return err
		}
	}
	return nil
}

func addDirs(a *archive, made map[string]bool, dir string) {
	if dir == "." || made[dir] {
		return
	}
	addDirs(a, made, path.Dir(dir))
	made[dir] = true
	a.dir(dir)
}

func addFile(a *archive, name, file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return status.Errorf(status.IO, "guest initrd: %w", err)
	}
	a.file(name, 0o755, data)
	return nil
}

func findTool(t tool) (string, error) {
	if file, err := exec.LookPath(t.name); err == nil {
		return file, nil
	}
	for _, d := range sysDirs {
		if file, err := exec.LookPath(filepath.Join(d, t.name)); err == nil {
			return file, nil
		}
	}
	return "", status.Errorf(status.NotFound, "%s is not installed; the guest needs it: apt-get install %s", t.name, t.pkg)
}

// libraries returns the absolute paths a program is linked with; none for a
// static one.
func libraries(ctx context.Context, file string) ([]string, error) {
	out, err := run(ctx, "", "ldd", file)
	if err != nil {
		if strings.Contains(err.Error(), "not a dynamic executable") {
			return nil, nil
		}
		return nil, err
	}
	return lddPaths(string(out)), nil
}

// lddPaths reads the lines "name => /path (0x…)" and "/path (0x…)".
func lddPaths(out string) []string {
	var paths []string
	for _, line := range strings.Split(out, "\n") {
		for _, f := range strings.Fields(line) {
			if strings.HasPrefix(f, "/") {
				paths = append(paths, f)
				break
			}
		}
	}
	return paths
}
