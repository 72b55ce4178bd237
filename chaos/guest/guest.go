// Package guest makes and drives the smallest useful Linux guest: what the
// demo, the chaos suite and the launcher's tests boot on a cairn volume.
//
// Duty: a Debian cloud kernel in a cache directory (unpacked, never
// installed), an initrd of about 3 MB with busybox, e2fsprogs and the virtio
// modules in dependency order (Ensure), and commands run over the guest's
// serial console with their output and exit status (Console). Floor: F5. It
// does not start the machine: vmhook/machine does.
package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cairnstore/cairn/proto/status"
	"golang.org/x/sys/unix"
)

// CacheEnv names the cache directory; unset, it is the user's cache directory
// (~/.cache/cairn).
const CacheEnv = "CAIRN_CACHE"

// MemoryBytes is enough for the guest to boot and to hold a few files more.
const MemoryBytes = 160 << 20

// Append is the kernel command line the initrd is made for: its shell is on
// the first serial port, and a panic ends the machine instead of hanging it.
const Append = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"

// Config says where Ensure keeps things.
type Config struct {
	Cache    string            // "": $CAIRN_CACHE, else ~/.cache/cairn
	Progress func(what string) // called before each slow step; may be nil
	// Storage adds what a machine needs that attaches volumes by itself: the
	// kernel's NBD client, xfs and its tools, a network card. Some MB more.
	Storage bool
}

// Image is what a machine needs to boot the guest.
type Image struct {
	Kernel  string // path of the bzImage
	Initrd  string // path of the gzip-ed cpio archive
	Append  string // kernel command line
	Release string // the kernel's package, for people
}

// Ensure returns a bootable image, fetching the kernel once and building the
// initrd whenever one of its parts has changed. Processes that ask at the same
// time wait for each other.
func Ensure(ctx context.Context, cfg Config) (Image, error) {
	dir, err := cacheDir(cfg.Cache)
	if err != nil {
		return Image{}, err
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return Image{}, err
	}
	img, err := ensureLocked(ctx, dir, cfg)
	if uerr := unlock(); err == nil && uerr != nil {
		return Image{}, status.Errorf(status.IO, "unlock the cache %s: %w", dir, uerr)
	}
	return img, err
}

func ensureLocked(ctx context.Context, dir string, cfg Config) (Image, error) {
	kernel, err := ensureKernel(ctx, dir, cfg.Progress)
	if err != nil {
		return Image{}, err
	}
	initrd, err := ensureInitrd(ctx, kernel, cfg)
	if err != nil {
		return Image{}, err
	}
	return Image{
		Kernel:  filepath.Join(kernel, "vmlinuz"),
		Initrd:  initrd,
		Append:  Append,
		Release: filepath.Base(kernel),
	}, nil
}

// With returns the image with a program of this machine, and what it is linked
// with, as bin/NAME in the guest. The new initrd is written into dir.
func (img Image) With(ctx context.Context, dir, name, program string) (Image, error) {
	base, err := os.ReadFile(img.Initrd)
	if err != nil {
		return Image{}, status.Errorf(status.IO, "guest initrd: %w", err)
	}
	libs, err := libraries(ctx, program)
	if err != nil {
		return Image{}, err
	}
	a := &archive{}
	if err := addFile(a, "bin/"+name, program); err != nil {
		return Image{}, err
	}
	needed := map[string]bool{}
	for _, l := range libs {
		needed[l] = true
	}
	if err := addLibraries(a, needed); err != nil {
		return Image{}, err
	}
	// The kernel unpacks one archive after another; this one is not compressed,
	// because an emulated processor is slower than a copy. Each begins at a
	// multiple of four bytes.
	for len(base)%4 != 0 {
		base = append(base, 0)
	}
	img.Initrd = filepath.Join(dir, "initrd-"+name)
	if err := writeFile(img.Initrd, append(base, a.bytes()...), 0o644); err != nil {
		return Image{}, status.Errorf(status.IO, "keep the initrd: %w", err)
	}
	return img, nil
}

// cacheDir returns the absolute cache directory, made if missing.
func cacheDir(dir string) (string, error) {
	if dir == "" {
		dir = os.Getenv(CacheEnv)
	}
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", status.Errorf(status.Invalid, "no place to keep the guest kernel: %w; set %s to a directory", err, CacheEnv)
		}
		dir = filepath.Join(user, "cairn")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", status.Errorf(status.IO, "cache directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", status.Errorf(status.IO, "make the cache directory: %w; set %s to one that can be written", err, CacheEnv)
	}
	return dir, nil
}

// lockDir waits for the cache to be ours alone.
func lockDir(dir string) (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, status.Errorf(status.IO, "lock the cache: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		if cerr := f.Close(); cerr != nil {
			err = fmt.Errorf("%w; %v", err, cerr)
		}
		return nil, status.Errorf(status.IO, "lock the cache %s: %w", dir, err)
	}
	return f.Close, nil // closing gives up the lock
}

// writeFile puts data at path whole or not at all.
func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func shortHash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}
