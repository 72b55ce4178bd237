package guest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// metaPackage depends on the kernel package of the day; it holds no kernel.
const metaPackage = "linux-image-cloud-amd64"

// wantedModules are what the guest needs beyond what the kernel has built in
// (ext4 is); their dependencies are found in the modules themselves. button
// and evdev make the power button work.
var wantedModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "button", "evdev"}

// storageModules come on top with Config.Storage.
var storageModules = []string{"virtio_net", "nbd", "xfs"}

// These list the unpacked modules, in loading order: without storageModules,
// and with them.
const (
	moduleOrderFile  = "modules.order"
	storageOrderFile = "modules.storage"
)

// ensureKernel returns the directory of an unpacked kernel: vmlinuz, the
// modules and moduleOrderFile. One that is there is good for ever: a guest
// that boots needs no newer one.
func ensureKernel(ctx context.Context, cache string, progress func(string)) (string, error) {
	root := filepath.Join(cache, "kernel")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", status.Errorf(status.IO, "guest kernel cache: %w", err)
	}
	have, err := filepath.Glob(filepath.Join(root, "*", storageOrderFile))
	if err != nil {
		return "", status.Errorf(status.Internal, "guest kernel cache: %w", err)
	}
	if len(have) > 0 {
		sort.Strings(have)
		return filepath.Dir(have[len(have)-1]), nil
	}
	tmp, err := os.MkdirTemp(cache, "unpack-")
	if err != nil {
		return "", status.Errorf(status.IO, "guest kernel cache: %w", err)
	}
	dir, err := fetchKernel(ctx, root, tmp, progress)
	if rerr := os.RemoveAll(tmp); err == nil && rerr != nil {
		return "", status.Errorf(status.IO, "guest kernel cache: %w", rerr)
	}
	return dir, err
}

// fetchKernel downloads the kernel package into tmp and leaves what the guest
// needs of it in a directory below root.
func fetchKernel(ctx context.Context, root, tmp string, progress func(string)) (string, error) {
	pkg, err := kernelPackage(ctx, progress)
	if err != nil {
		return "", err
	}
	progress("downloading " + pkg)
	if _, err := run(ctx, tmp, "apt-get", "download", "-q", pkg); err != nil {
		return "", status.Errorf(status.Unavailable, "download the guest kernel: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", status.Errorf(status.Unavailable, "apt-get download %s left %d packages, want 1", pkg, len(debs))
	}
	progress("unpacking " + filepath.Base(debs[0]))
	tree := filepath.Join(tmp, "tree")
	if _, err := run(ctx, tmp, "dpkg-deb", "-x", debs[0], tree); err != nil {
		return "", status.Errorf(status.IO, "unpack the guest kernel: %w", err)
	}
	slim := filepath.Join(tmp, "slim")
	if err := pickKernel(tree, slim); err != nil {
		return "", err
	}
	final := filepath.Join(root, strings.TrimSuffix(filepath.Base(debs[0]), ".deb"))
	if err := os.RemoveAll(final); err != nil { // with fewer modules, from before
		return "", status.Errorf(status.IO, "replace the guest kernel: %w", err)
	}
	if err := os.Rename(slim, final); err != nil {
		return "", status.Errorf(status.IO, "keep the guest kernel: %w", err)
	}
	return final, nil
}

// kernelPackage finds the package behind metaPackage, refreshing apt's lists
// when they do not know it (a fresh machine has none).
func kernelPackage(ctx context.Context, progress func(string)) (string, error) {
	for try := 0; ; try++ {
		out, err := run(ctx, "", "apt-cache", "depends", metaPackage)
		if pkg := dependsOn(out, "linux-image-"); pkg != "" {
			return pkg, nil
		}
		if errors.Is(err, exec.ErrNotFound) {
			return "", status.Errorf(status.Unsupported, "the guest kernel comes from Debian packages, and this machine has no apt-cache: %w", err)
		}
		if try > 0 {
			return "", status.Errorf(status.NotFound, "apt knows no package %s; the guest kernel needs Debian 12 package sources for amd64", metaPackage)
		}
		progress("refreshing the package lists")
		if _, err := run(ctx, "", "apt-get", "update", "-q"); err != nil {
			return "", status.Errorf(status.Unavailable, "refresh the package lists for the guest kernel: %w", err)
		}
	}
}

// dependsOn reads the output of apt-cache depends.
func dependsOn(out []byte, prefix string) string {
	for _, line := range strings.Split(string(out), "\n") {
		if dep, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(dep, prefix) {
			return dep
		}
	}
	return ""
}

// pickKernel copies the kernel and the wanted modules from an unpacked package.
func pickKernel(tree, slim string) error {
	kernels, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return status.Errorf(status.Unsupported, "the kernel package holds %d kernels, want 1", len(kernels))
	}
	modules, err := findModules(tree)
	if err != nil {
		return err
	}
	depends := func(name string) ([]string, error) {
		file, ok := modules[name]
		if !ok {
			return nil, status.Errorf(status.NotFound, "the kernel package has no module %s", name)
		}
		return moduleDepends(file)
	}
	small, err := loadOrder(wantedModules, depends)
	if err != nil {
		return err
	}
	order, err := loadOrder(append(slices.Clone(wantedModules), storageModules...), depends)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(slim, 0o755); err != nil {
		return status.Errorf(status.IO, "keep the guest kernel: %w", err)
	}
	if err := os.Rename(kernels[0], filepath.Join(slim, "vmlinuz")); err != nil {
		return status.Errorf(status.IO, "keep the guest kernel: %w", err)
	}
	for _, name := range order {
		if err := os.Rename(modules[name], filepath.Join(slim, name+".ko")); err != nil {
			return status.Errorf(status.IO, "keep module %s: %w", name, err)
		}
	}
	for name, list := range map[string][]string{moduleOrderFile: small, storageOrderFile: order} {
		if err := os.WriteFile(filepath.Join(slim, name), []byte(strings.Join(list, "\n")+"\n"), 0o644); err != nil {
			return status.Errorf(status.IO, "keep the guest kernel: %w", err)
		}
	}
	return nil
}

// findModules maps each module's name to its file.
func findModules(tree string) (map[string]string, error) {
	out := map[string]string{}
	err := filepath.WalkDir(filepath.Join(tree, "lib", "modules"), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := strings.CutSuffix(d.Name(), ".ko"); ok && !d.IsDir() {
			out[moduleName(name)] = p
		}
		return nil
	})
	if err != nil {
		return nil, status.Errorf(status.IO, "read the kernel's modules: %w", err)
	}
	return out, nil
}

// run runs a program and returns its stdout; its stderr is in the error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, status.Errorf(status.Of(err), "%s: %w: %s", name, err, strings.TrimSpace(lastBytes(stderr.Bytes(), 1000)))
	}
	return out, nil
}

func lastBytes(b []byte, n int) string {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return string(b)
}
