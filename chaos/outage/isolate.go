package outage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// isolatedEnv tells a process that it runs isolated.
const isolatedEnv = "CAIRN_OUTAGE_ISOLATED"

// bootID is where the kernel says which boot this is.
const bootID = "/proc/sys/kernel/random/boot_id"

// Isolate runs this program once more, in namespaces of its own for network
// and mounts, so that packets can be dropped and the boot id be another without
// anybody else noticing; they end with the process. Only the isolated
// process gets done = false; otherwise code is the exit status to end with.
// Needs root.
func Isolate() (done bool, code int, err error) {
	if os.Getenv(isolatedEnv) != "" {
		return false, 0, enter()
	}
	if os.Geteuid() != 0 {
		return true, 1, status.Errorf(status.Invalid, "outages are made in a network namespace of their own: run this as root")
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), isolatedEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	// Ctrl-C reaches the child too, which stops in order: wait for it.
	signal.Ignore(os.Interrupt)
	var ended *exec.ExitError
	if err := cmd.Run(); errors.As(err, &ended) {
		return true, max(1, ended.ExitCode()), nil
	} else if err != nil {
		return true, 1, fmt.Errorf("the isolated process does not start: %w", err)
	}
	return true, 0, nil
}

// enter makes the namespaces usable: loopback up, mounts our own.
func enter() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("loopback in a namespace of its own: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of our own: %w", err)
	}
	return nil
}

// reboot gives every process that starts from now on another boot id. file is
// a scratch file that must outlive them.
func reboot(dir, id string) error {
	file := filepath.Join(dir, "boot_id")
	if err := os.WriteFile(file, []byte(id+"\n"), 0o644); err != nil {
		return fmt.Errorf("another boot id: %w", err)
	}
	now, err := os.ReadFile(bootID)
	if err != nil {
		return fmt.Errorf("the boot id: %w", err)
	}
	if string(now) == id+"\n" {
		return nil // mounted already: the same file, written anew
	}
	if err := unix.Mount(file, bootID, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("another boot id in %s: %w", bootID, err)
	}
	return nil
}
