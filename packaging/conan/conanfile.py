import os

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy
from conan.tools.layout import basic_layout
from conan.tools.scm import Version

required_conan_version = ">=2.0"


class VattnConan(ConanFile):
    name = "vattn"
    description = "Verified sparse attention: header-only C++20"
    license = "MIT"
    topics = ("attention", "kv-cache", "sampling", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    no_copy_source = True

    # The tree that this recipe lies in. In a registry: source(), with get(self, **self.conan_data["sources"][self.version], strip_root=True).
    def export_sources(self):
        top = os.path.join(self.recipe_folder, "..", "..")
        for pattern in ("LICENSE", "include/*"):
            copy(self, pattern, top, self.export_sources_folder)

    def layout(self):
        basic_layout(self)

    def requirements(self):
        self.requires("eigen/3.4.0")

    def package_id(self):
        self.info.clear()

    def validate(self):
        check_min_cppstd(self, 20)
        least = {"gcc": "12", "clang": "14"}.get(str(self.settings.compiler))
        if least and Version(self.settings.compiler.version) < least:
            raise ConanInvalidConfiguration(f"{self.name} needs {self.settings.compiler} {least} or newer")

    # Says that there is nothing to build.
    def build(self):
        pass

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "*", os.path.join(self.source_folder, "include"), os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "vattn")
        self.cpp_info.set_property("cmake_target_name", "vattn::vattn")
        self.cpp_info.set_property("pkg_config_name", "vattn")
